-- A database of schema 0001 as tmd-eval wrote it: sqlite3 old.db < this file
BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0001');
CREATE TABLE metrics (
	result_id INTEGER NOT NULL, 
	name VARCHAR(128) NOT NULL, 
	value FLOAT NOT NULL, 
	low FLOAT, 
	high FLOAT, 
	n INTEGER NOT NULL, 
	completeness FLOAT NOT NULL, 
	metric_version TEXT NOT NULL, 
	weight_hashes JSON NOT NULL, 
	CONSTRAINT pk_metrics PRIMARY KEY (result_id, name), 
	CONSTRAINT fk_metrics_result_id_results FOREIGN KEY(result_id) REFERENCES results (id) ON DELETE CASCADE
);
INSERT INTO "metrics" VALUES(1,'alignment_background',0.7451171875,0.7089599609375,7.81274414062499866773e-01,1024,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(1,'alignment_color',0.990234375,0.984375,0.99609375,1024,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(1,'alignment_color2',9.72222222222222209886e-01,9.6014492753623192911e-01,9.83091787439613562504e-01,828,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(1,'alignment_count',0.8837890625,0.86328125,0.904296875,1024,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(1,'alignment_direction',0.9423828125,0.927734375,0.9560546875,1024,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(1,'alignment_joint',0.0927734375,0.0703125,0.115234375,1024,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(1,'alignment_relation',8.96135265700483074624e-01,8.7439613526570048041e-01,9.15458937198067590479e-01,828,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(1,'alignment_shape',0.2705078125,0.236328125,0.3056640625,1024,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(1,'alignment_shape2',2.68115942028985532186e-01,2.34299516908212573929e-01,3.05555555555555580227e-01,828,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(1,'alignment_speed',0.93359375,0.9189453125,0.9482421875,1024,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(1,'diversity',7.65982609351976817535e-01,6.47679642108411224299e-01,8.87920860517873888895e-01,1024,1.0,'micro-diversity-1','{}');
INSERT INTO "metrics" VALUES(1,'diversity_background',8.36959429826752865366e-01,6.85109595328200926545e-01,1.00973547517201467371e+00,1024,1.0,'micro-diversity-1','{}');
INSERT INTO "metrics" VALUES(1,'diversity_motion',7.53254063029049847344e-01,6.9875502115651755286e-01,8.15531817240361611709e-01,1024,1.0,'micro-diversity-1','{}');
INSERT INTO "metrics" VALUES(1,'diversity_phase',0.767011259268181,1.18933498300739709518e-01,1.48489907030113399422e+00,1024,1.0,'micro-diversity-1','{}');
INSERT INTO "metrics" VALUES(1,'diversity_place',8.59363245235118866638e-01,7.91883033115269641122e-01,9.2785963478140265348e-01,1024,1.0,'micro-diversity-1','{}');
INSERT INTO "metrics" VALUES(1,'diversity_size',6.13325049400781141528e-01,5.55543998810860917281e-01,6.75430237741249439586e-01,1024,1.0,'micro-diversity-1','{}');
INSERT INTO "metrics" VALUES(1,'frechet',2.87610208589158418135e+01,2.74470689228815203355e+01,3.0132134120149238754e+01,1024,1.0,'micro-frechet-1','{}');
INSERT INTO "metrics" VALUES(1,'frechet_real',1.03173882281510032044e+00,7.54606923162545517591e-01,1.38430648020025826028e+00,1024,1.0,'micro-frechet-1','{}');
INSERT INTO "metrics" VALUES(4,'alignment_background',0.7451171875,0.7089599609375,7.81274414062499866773e-01,1024,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(4,'alignment_color',0.990234375,0.984375,0.99609375,1024,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(4,'alignment_color2',9.72222222222222209886e-01,9.6014492753623192911e-01,9.83091787439613562504e-01,828,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(4,'alignment_count',0.8837890625,0.86328125,0.904296875,1024,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(4,'alignment_direction',0.9423828125,0.927734375,0.9560546875,1024,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(4,'alignment_joint',0.0927734375,0.0703125,0.115234375,1024,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(4,'alignment_relation',8.96135265700483074624e-01,8.7439613526570048041e-01,9.15458937198067590479e-01,828,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(4,'alignment_shape',0.2705078125,0.236328125,0.3056640625,1024,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(4,'alignment_shape2',2.68115942028985532186e-01,2.34299516908212573929e-01,3.05555555555555580227e-01,828,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(4,'alignment_speed',0.93359375,0.9189453125,0.9482421875,1024,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(4,'diversity',7.65982609351976817535e-01,6.47679642108411224299e-01,8.87920860517873888895e-01,1024,1.0,'micro-diversity-1','{}');
INSERT INTO "metrics" VALUES(4,'diversity_background',8.36959429826752865366e-01,6.85109595328200926545e-01,1.00973547517201467371e+00,1024,1.0,'micro-diversity-1','{}');
INSERT INTO "metrics" VALUES(4,'diversity_motion',7.53254063029049847344e-01,6.9875502115651755286e-01,8.15531817240361611709e-01,1024,1.0,'micro-diversity-1','{}');
INSERT INTO "metrics" VALUES(4,'diversity_phase',0.767011259268181,1.18933498300739709518e-01,1.48489907030113399422e+00,1024,1.0,'micro-diversity-1','{}');
INSERT INTO "metrics" VALUES(4,'diversity_place',8.59363245235118866638e-01,7.91883033115269641122e-01,9.2785963478140265348e-01,1024,1.0,'micro-diversity-1','{}');
INSERT INTO "metrics" VALUES(4,'diversity_size',6.13325049400781141528e-01,5.55543998810860917281e-01,6.75430237741249439586e-01,1024,1.0,'micro-diversity-1','{}');
INSERT INTO "metrics" VALUES(4,'frechet',2.87610208589158418135e+01,2.74470689228815203355e+01,3.0132134120149238754e+01,1024,1.0,'micro-frechet-1','{}');
INSERT INTO "metrics" VALUES(4,'frechet_real',1.03173882281510032044e+00,7.54606923162545517591e-01,1.38430648020025826028e+00,1024,1.0,'micro-frechet-1','{}');
INSERT INTO "metrics" VALUES(2,'alignment_background',0.7255859375,0.69140625,0.7587890625,1024,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(2,'alignment_color',0.986328125,0.9794921875,0.9931640625,1024,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(2,'alignment_color2',9.42028985507246341413e-01,9.25120772946859903917e-01,9.5772946859903385075e-01,828,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(2,'alignment_count',0.8623046875,0.8408203125,0.8837890625,1024,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(2,'alignment_direction',0.9609375,0.9491943359375,0.97265625,1024,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(2,'alignment_joint',0.0634765625,0.046875,0.0810546875,1024,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(2,'alignment_relation',9.08212560386473466422e-01,8.87681159420289800365e-01,0.928743961352657,828,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(2,'alignment_shape',0.333984375,0.298828125,3.71118164062499866773e-01,1024,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(2,'alignment_shape2',1.82367149758454111241e-01,1.53381642512077281947e-01,2.12560386473429951958e-01,828,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(2,'alignment_speed',0.9599609375,0.947265625,0.9716796875,1024,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(2,'diversity',6.57902042016195842677e-01,5.55478842566739738906e-01,7.52447102074400353544e-01,1024,1.0,'micro-diversity-1','{}');
INSERT INTO "metrics" VALUES(2,'diversity_background',5.09227906197145752109e-01,4.06851932565248597395e-01,6.30846861278629433833e-01,1024,1.0,'micro-diversity-1','{}');
INSERT INTO "metrics" VALUES(2,'diversity_motion',5.07752380604086339666e-01,4.7068481560487934745e-01,5.44622807494196781163e-01,1024,1.0,'micro-diversity-1','{}');
INSERT INTO "metrics" VALUES(2,'diversity_phase',1.21392525817843277557e+00,7.79837403204575063675e-01,1.63015965882045,1024,1.0,'micro-diversity-1','{}');
INSERT INTO "metrics" VALUES(2,'diversity_place',5.04370668019968104722e-01,4.63772672872968916291e-01,0.550183918552256,1024,1.0,'micro-diversity-1','{}');
INSERT INTO "metrics" VALUES(2,'diversity_size',5.54233997081346463353e-01,4.92588919076527853579e-01,6.20882500461127917468e-01,1024,1.0,'micro-diversity-1','{}');
INSERT INTO "metrics" VALUES(2,'frechet',1.31578149869462066587e+01,1.22953297080260135485e+01,1.40807151962028758167e+01,1024,1.0,'micro-frechet-1','{}');
INSERT INTO "metrics" VALUES(2,'frechet_real',1.03173882281510032044e+00,7.54606923162545517591e-01,1.38430648020025826028e+00,1024,1.0,'micro-frechet-1','{}');
INSERT INTO "metrics" VALUES(3,'alignment_background',0.85546875,0.8046875,0.90234375,256,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(3,'alignment_color',1.0,9.71591946556456087513e-01,1.0,256,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(3,'alignment_color2',9.84615384615384670041e-01,9.61538461538461564082e-01,1.0,130,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(3,'alignment_count',0.98828125,0.97265625,1.0,256,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(3,'alignment_direction',0.99609375,0.98828125,1.0,256,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(3,'alignment_joint',0.28125,0.2109375,0.3515625,256,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(3,'alignment_relation',9.69230769230769229061e-01,9.38461538461538458122e-01,9.9230769230769233502e-01,130,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(3,'alignment_shape',0.40234375,0.328125,0.4765625,256,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(3,'alignment_shape2',4.53846153846153843591e-01,3.53846153846153865796e-01,5.61538461538461541877e-01,130,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(3,'alignment_speed',0.99609375,0.98828125,1.0,256,1.0,'micro-judge-1','{}');
INSERT INTO "metrics" VALUES(3,'diversity',9.43731084330705849438e-01,0.849901716047219,1.10432351450860366526e+00,256,1.0,'micro-diversity-1','{}');
INSERT INTO "metrics" VALUES(3,'diversity_background',9.77999973625698904022e-01,8.52272567622835097722e-01,1.16448693071713882396e+00,256,1.0,'micro-diversity-1','{}');
INSERT INTO "metrics" VALUES(3,'diversity_motion',0.593491318169615,5.21191726910923303073e-01,6.83322671680266502391e-01,256,1.0,'micro-diversity-1','{}');
INSERT INTO "metrics" VALUES(3,'diversity_phase',1.59355599140875781039e+00,1.14062340019183516837e+00,2.30677057892233117186e+00,256,1.0,'micro-diversity-1','{}');
INSERT INTO "metrics" VALUES(3,'diversity_place',8.94364318621939657916e-01,7.77040513249782294202e-01,1.03022719280479457815e+00,256,1.0,'micro-diversity-1','{}');
INSERT INTO "metrics" VALUES(3,'diversity_size',6.59243819827518229281e-01,5.52241360543919368453e-01,7.86123140440309287058e-01,256,1.0,'micro-diversity-1','{}');
INSERT INTO "metrics" VALUES(3,'frechet',1.4266925033167865422e+01,1.25673168352959692124e+01,1.63576961401894145349e+01,256,1.0,'micro-frechet-1','{}');
INSERT INTO "metrics" VALUES(3,'frechet_real',3.90787890144973459882e+00,2.66518331862208146532e+00,5.25553889379133920556e+00,256,1.0,'micro-frechet-1','{}');
CREATE TABLE results (
	id INTEGER NOT NULL, 
	"key" VARCHAR(64) NOT NULL, 
	source VARCHAR(16) NOT NULL, 
	name TEXT NOT NULL, 
	role VARCHAR(16) NOT NULL, 
	method VARCHAR(64) NOT NULL, 
	m INTEGER, 
	n INTEGER, 
	h INTEGER, 
	blocks INTEGER, 
	effective_nfe FLOAT, 
	forward_passes FLOAT, 
	guidance FLOAT, 
	sampler TEXT, 
	base TEXT, 
	checkpoint TEXT, 
	checkpoint_hash VARCHAR(64), 
	prompts_name TEXT NOT NULL, 
	prompts_sha256 VARCHAR(64) NOT NULL, 
	prompts_count INTEGER NOT NULL, 
	samples_per_prompt INTEGER NOT NULL, 
	seeds JSON NOT NULL, 
	height INTEGER, 
	width INTEGER, 
	frames INTEGER, 
	fps FLOAT, 
	dtype VARCHAR(16), 
	videos INTEGER NOT NULL, 
	seconds_per_video FLOAT, 
	batch_size INTEGER, 
	device TEXT NOT NULL, 
	code_revision TEXT NOT NULL, 
	packages JSON NOT NULL, 
	command TEXT NOT NULL, 
	created DATETIME NOT NULL, 
	manifest_sha256 VARCHAR(64) NOT NULL, 
	run TEXT NOT NULL, 
	CONSTRAINT pk_results PRIMARY KEY (id), 
	CONSTRAINT ck_results_role CHECK (role IN ('teacher', 'undistilled', 'student')), 
	CONSTRAINT uq_results_key UNIQUE ("key")
);
INSERT INTO "results" VALUES(1,'ab6533de06627f50bb0a76a649df9f38aeaac6cf0212723f0cc540d79a5d9b31','measured','TMD-N2H2, M = 2','student','tmd',2,2,2,10,2.4,2.4,1.0,'tmd','micro, sha256 c9756e39d397b0dfcf98402f104cbb900fb0c6c279b26c6fc2dde7d266459332','/home/lab/quickstart/stage2/checkpoint','dd2d2aa69723a3ef9a3153499d18dcc13e2a0d20086466da9167e65ebf7f12ed','micro','6fbe04c0bff4fa2c323ce1bfec363aed396157635d1eb988062c3e08d119f8b0',512,2,'[0]',32,32,5,4.0,'float32',1024,0.016137,64,'AMD EPYC (cpu, 1 thread)','956f5bad41bf2ebdded12d369d6ddac752595bd2','{"python": "3.11.7", "tmd-eval": "0.1.0", "torch": "2.14.1", "diffusers": "0.42.1", "transformers": "5.23.0", "numpy": "2.4.6", "scipy": "1.17.1", "av": "18.1.0"}','tmd-eval quickstart --out quickstart','2026-11-23 06:16:33.000000','aa831464bbc47580af34c0dbc55a9b5f45ef2c3e52c2851d7259392666a79468','/home/lab/quickstart/runs/student');
INSERT INTO "results" VALUES(2,'30cbf1daff07c052c1969cd83e120e11dc29cf45cad2be3c28ca8064f1c87ce3','measured','micro undistilled, 2 steps','undistilled','teacher',2,NULL,NULL,10,2.0,4.0,1.5,'UniPCMultistepScheduler(flow_shift=3)','micro, sha256 c9756e39d397b0dfcf98402f104cbb900fb0c6c279b26c6fc2dde7d266459332','micro','c9756e39d397b0dfcf98402f104cbb900fb0c6c279b26c6fc2dde7d266459332','micro','6fbe04c0bff4fa2c323ce1bfec363aed396157635d1eb988062c3e08d119f8b0',512,2,'[0]',32,32,5,4.0,'float32',1024,0.022196,64,'AMD EPYC (cpu, 1 thread)','956f5bad41bf2ebdded12d369d6ddac752595bd2','{"python": "3.11.7", "tmd-eval": "0.1.0", "torch": "2.14.1", "diffusers": "0.42.1", "transformers": "5.23.0", "numpy": "2.4.6", "scipy": "1.17.1", "av": "18.1.0"}','tmd-eval quickstart --out quickstart','2026-11-23 06:15:45.000000','05250ed5b2d48c804e1303a131263cdcd07941de42ee637db969e1f344693abf','/home/lab/quickstart/runs/undistilled');
INSERT INTO "results" VALUES(3,'afbd00d911178a2d8536c9d24057cf5835a014edc336913b1b966c35ad586cb7','measured','micro teacher, 50 steps','teacher','teacher',50,NULL,NULL,10,50.0,100.0,1.5,'UniPCMultistepScheduler(flow_shift=3)','micro, sha256 c9756e39d397b0dfcf98402f104cbb900fb0c6c279b26c6fc2dde7d266459332','micro','c9756e39d397b0dfcf98402f104cbb900fb0c6c279b26c6fc2dde7d266459332','micro','cbef9842d6f43c4e4814d56403956e09725e06ea9bf9f68de311cc271e9cd889',128,2,'[0]',32,32,5,4.0,'float32',256,4.18744499999999963968e-01,64,'AMD EPYC (cpu, 1 thread)','956f5bad41bf2ebdded12d369d6ddac752595bd2','{"python": "3.11.7", "tmd-eval": "0.1.0", "torch": "2.14.1", "diffusers": "0.42.1", "transformers": "5.23.0", "numpy": "2.4.6", "scipy": "1.17.1", "av": "18.1.0"}','tmd-eval micro --ckpt micro --out quickstart/runs/teacher --seed 0 --num-prompts 128 --samples-per-prompt 2 --batch-size 64 --device cpu','2026-11-23 06:10:08.000000','80e3c49efcdeea06b941df055939ecf7d1facf8cfcfd1db50d16ebb042245800','/home/lab/quickstart/runs/teacher');
INSERT INTO "results" VALUES(4,'a3f941a02ef145309e04ea1fdd2e6e97035664583d7b72959b2793048884ff24','measured','TMD-N2H2, M = 2','student','tmd',2,2,2,10,2.4,2.4,1.0,'tmd','micro, sha256 c9756e39d397b0dfcf98402f104cbb900fb0c6c279b26c6fc2dde7d266459332','quickstart/stage2/checkpoint','dd2d2aa69723a3ef9a3153499d18dcc13e2a0d20086466da9167e65ebf7f12ed','micro','6fbe04c0bff4fa2c323ce1bfec363aed396157635d1eb988062c3e08d119f8b0',512,2,'[0]',32,32,5,4.0,'float32',1024,0.019789,64,'AMD EPYC (cpu, 1 thread)','db20ec384ec84d561f9e5b298c97241b2287620f','{"python": "3.11.7", "tmd-eval": "0.1.0", "torch": "2.14.1", "diffusers": "0.42.1", "transformers": "5.23.0", "numpy": "2.4.6", "scipy": "1.17.1", "av": "18.1.0"}','tmd-eval quickstart --out quickstart','2026-11-23 06:29:20.000000','cd8ef9dff6f30389cced3d9b263931af11366853697a47d0539dcbe5a51a0995','/home/lab/quickstart/runs/student');
COMMIT;
