"""What a model answers, and how that is judged.

Read first: `generation`, then `rates`.

- `generation`: `generate`, greedy answers side by side, under whatever edits are active or each arm has.
- `rates`: `refusals`, `attack_successes` (an answer each), `refusal_rate`, `attack_success_rate`, `compare_rates`.
- `judges`: what a judge is, the list of phrases (`StringJudge`, `is_refusal`), and `Question`.
- `model_judges`: `PromptJudge` and `ClassifierJudge`, models here. `server_judge`: `ServerJudge`, a model elsewhere.
- `openings`: `refusal_log_odds`, refusal before a word is said.
- `weaknesses`: `weaknesses` of the textbook kind in code, by pattern.
- `coherence`: `coherence` and `perplexity`, whether answers make sense.
"""
