"""The study as Markdown: results first, then what a sceptical reader asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from studies.analyze import SMALL_NOTE

NONE = "\N{EN DASH}"
"""Where there is no number."""


def markdown(preferences: Mapping[str, Any], analysis: Mapping[str, Any]) -> str:
    """Write the report.

    Args:
        preferences: content of preferences.json.
        analysis: the whole analysis.
    """
    lines = [f"# Preference study {_text(preferences['study'])}", ""]
    if preferences["simulated"]:
        lines += ["**The raters are simulated from a stated model; these are not the preferences of people.**", ""]
        lines += [*(f"The stated model: `{_text(command)}`" for command in analysis["simulated_by"]), ""]
    after = analysis["votes_after_unblinding"]
    if after:
        lines += [
            f"**{after} main votes were cast after the study was unblinded: whoever collected them could see who was "
            "winning, so p-values may be too small and intervals too sure.**",
            "",
        ]
    lines += [
        f"{preferences['votes']} of {preferences['wanted_votes']} votes, {preferences['raters']} raters kept, "
        f"{preferences['excluded_raters']} left out by the rules fixed before the first vote.",
        "",
        "![Preferences with 95 % intervals](preferences.png)",
        "",
    ]
    lines += _table(
        ["Question", "A", "B", "A preferred (95 %)", "p", "p (Holm)", "A / B / tie", "Prompts", "Raters"],
        [
            [
                row["question"], row["a"], row["b"], _interval(row), _p(row["p_value"]), _p(row["p_holm"]),
                f"{row['wins_a']} / {row['wins_b']} / {row['ties']}", row["n_prompts"], row["n_raters"],
            ]
            for row in preferences["results"]
        ],
    )  # fmt: skip
    methods = dict.fromkeys(row["method"] for row in preferences["results"])
    lines += ["", "Method: " + "; ".join(methods) + "."]
    if analysis["small_design"]:
        lines += ["", SMALL_NOTE]
    lines += ["", "## Other estimates of the same", ""]
    lines += _table(
        ["Question", "A", "B", "Wilson (as if independent)", "Logit, clustered", "Permutation p", "Two-way bootstrap",
         "Binomial p", "Design effect"],
        [
            [
                row["question"], row["a"], row["b"], _ends(row["wilson"]),
                _interval(row["logit"]) if row["logit"] else NONE, _p(row["permutation_p"]), _ends(row["bootstrap"]),
                _p(row["plain_binomial_p"]), _number(row["design_effect"]),
            ]
            for row in analysis["results"]
        ],
    )  # fmt: skip
    lines += [
        "",
        "The design effect says how many votes of this study are worth one independent vote; the plain binomial test "
        "and Wilson's interval ignore it. More votes on the same prompts make the interval shorter only up to what the "
        "prompts leave. The two-way bootstrap is known to be conservative.",
    ]
    lines += _ranking(analysis["ranking"]) if analysis["ranking"] else []
    lines += ["", "## Raters", ""]
    consistency, bias = analysis["self_consistency"], analysis["position_bias"]
    lines += _table(
        ["Question", "Krippendorff's alpha", "Raw agreement", "Same answer to swapped repeats", "Left, main trials",
         "Left, identical clips"],
        [
            [
                question, _number(row["alpha"]), _share(row["agreement"]),
                f"{_share(consistency[question]['share'])} of {consistency[question]['repeats']}",
                f"{_share(bias[question]['main']['left'])} of {bias[question]['main']['n']}",
                f"{_share(bias[question]['identical']['left'])} of {bias[question]['identical']['n']}",
            ]
            for question, row in analysis["agreement"].items()
        ],
    )  # fmt: skip
    reasons = [f"- {rater}: {reason}" for rater, reason in analysis["excluded_raters"].items()]
    lines += ["", "Left out:", "", *reasons] if reasons else ["", "No rater was left out."]
    lines += ["", "## If one had decided otherwise", ""]
    lines += _table(
        ["Variant", "Question", "A", "B", "A preferred (95 %)", "p", "Votes", "Raters"],
        [
            [
                row["variant"], row["question"], row["a"], row["b"], _interval(row), _p(row["p_value"]),
                row["n_votes"], row["n_raters"],
            ]
            for row in analysis["sensitivity"]
        ],
    )  # fmt: skip
    lines += [
        "",
        "A tie counts one half in the headline; leaving ties out is what Davidson's model estimates for a pair.",
        "",
        f"Schedule `{preferences['schedule_hash']}`, unblinded {analysis['unblinded']} with {after} main votes cast "
        f"after it, analysed {preferences['created']} by `{_text(preferences['command'])}` at "
        f"{preferences['code_revision']}.",
        "",
    ]
    return "\n".join(lines)


def _ranking(ranking: Mapping[str, Any]) -> list[str]:
    lines = ["", "## Ranking (Bradley-Terry, clustered by prompt and rater)", ""]
    for question, fitted in ranking.items():
        if fitted is None:
            lines += [f"{question}: no finite fit, since a model won or lost every vote.", ""]
            continue
        rows = [
            [row["model"], _interval({"value": row["win"], **row}), _number(row["strength"])]
            for row in fitted["models"]
        ]
        lines += [f"### {question.capitalize()}", ""]
        lines += _table(["Model", "Preferred to an average other (95 %)", "Strength (log-odds)"], rows)
        pairs = [[row["a"], row["b"], _share(row["observed"]), _share(row["modelled"])] for row in fitted["pairs"]]
        lines += ["", *_table(["A", "B", "Observed", "Modelled"], pairs), ""]
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    body = ["| " + " | ".join(_text(cell) for cell in row) + " |" for row in rows]
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *body]


def _text(value: Any) -> str:
    """A cell: no bars, no line breaks, no HTML."""
    text = " ".join(str(value).split())
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _interval(row: Mapping[str, Any]) -> str:
    return f"**{100 * row['value']:.1f} %** [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def _ends(ends: Sequence[float]) -> str:
    return f"[{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f} %"
