"""Preference studies (two-alternative forced choice): design, clips, serving, votes and their statistics.

| module | holds |
|---|---|
| design, schedule | the plan: pairs, prompts, seeds, sides, catch trials; pure, seeded, hashed |
| video_sets, clips, create | from video sets to a study folder and its rows in the database |
| models, database, ballots, votes, unblind | raters, leases, votes, withdrawal, the audit log |
| app, guard, identity, page, texts, status | the FastAPI routes and the page in Gradio |
| logit, wins | pure statistics |
| tally, compare, ranking, analyze | unblinded votes, one pair, all models, the whole study |
| report, html, figure, report_json, export | Markdown, page, figure, report.json, CSV, Parquet |
| simulate, rehearse, power | raters from a stated model, and what a design can detect |
"""
