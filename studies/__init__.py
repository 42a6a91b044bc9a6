"""Preference studies (two-alternative forced choice): design, clips, serving, votes and their statistics.

| module | holds |
|---|---|
| design, schedule | the plan: pairs, prompts, seeds, sides, catch trials; pure, seeded, hashed |
| video_sets, clips, create | from video sets to a study folder and its rows in the database |
| models, database, ballots, votes, audit | raters, leases, votes, withdrawal, the audit log |
| app, page, texts | the FastAPI routes and the page in Gradio |
| logit, permutation, bootstrap, agreement | pure statistics |
| analyze, report, figure, export | results, figure, Markdown, CSV, Parquet, preferences.json |
| simulate, power | raters from a stated model, and what a design can detect |
"""
