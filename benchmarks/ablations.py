"""The ablations: those of `secateur`, and those of the papers PIEM + LSPS (Wang) and SlimLLM (Guo et al.). Each variant is a request."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.case import Case
from benchmarks.sections import Row, Section

TERMS = {
    "‖W‖1": {"lambda_weight": 1.0, "lambda_loss": 0.0, "gamma": 0.0},
    "ΔL": {"lambda_weight": 0.0, "lambda_loss": 1.0, "gamma": 0.0},
    "∂L/∂u": {"lambda_weight": 0.0, "lambda_loss": 0.0, "gamma": 1.0},
    "‖W‖1 and ΔL": {"gamma": 0.0},
    "all three": {},
}


def ablations(base: Case, seeds: Sequence[int]) -> list[Section]:
    """Return the ablations on the model and calibration windows of ``base``; SlimLLM's table 7 varies the windows."""

    def section(title: str, head: str, ratios: Sequence[float], cases: dict[str, Case]) -> Section:
        return Section(title, (head,), ratios, seeds, [Row((label,), case) for label, case in cases.items()])

    def piem(method: str, rounds: int, **changes: Any) -> Case:
        return replace(base, method=method, rounds=rounds, changes=changes)

    def slimllm(**changes: Any) -> Case:
        return replace(base, method="slimllm", rounds=1, changes=changes)

    def secateur(**changes: Any) -> Case:
        return replace(base, method="secateur", rounds=1, changes=changes)

    return [
        section(
            "Secateur: its components, each replaced by another",
            "variant",
            [0.2, 0.4],
            {
                "secateur": secateur(),
                "uniform ratios": secateur(allocation={"kind": "uniform"}),
                "fit to the layer alone": secateur(recovery={"layerwise": {"fit_to": "layer"}}),
                "damping 0.01": secateur(recovery={"layerwise": {"damping": 0.01}}),
                "no layer-wise recovery": secateur(recovery={"layerwise": {"kind": "none"}}),
                "sparsegpt's layer-wise recovery": secateur(
                    recovery={"layerwise": {"fit_to": "layer", "damping": 0.01}}
                ),
            },
        ),
        section(
            "PIEM + LSPS, table 3: the two components (4 rounds)",
            "variant",
            [0.2, 0.5],
            {
                "neither: L1 norm, uniform": piem("magnitude", 4),
                "PIEM": piem("piem", 4),
                "LSPS": piem("lsps", 4),
                "both": piem("piem-lsps", 4),
            },
        ),
        section(
            "PIEM, figure 5: terms of the score (uniform ratios, 1 round)",
            "terms",
            [0.1, 0.2, 0.3, 0.4, 0.5],
            {label: piem("piem", 1, scoring=terms) if terms else piem("piem", 1) for label, terms in TERMS.items()},
        ),
        section(
            "PIEM + LSPS, figure 6: rounds",
            "rounds",
            [0.2, 0.5],
            {str(rounds): piem("piem-lsps", rounds) for rounds in (1, 2, 4, 8)},
        ),
        section(
            "SlimLLM, table 4: its strategies",
            "variant",
            [0.5],
            {
                "SlimLLM": slimllm(),
                "without greedy search": slimllm(scoring={"greedy_swaps": False}),
                "without feature space importance": slimllm(scoring={"feature_space": False}),
                "without non-uniform ratios": slimllm(allocation={"kind": "uniform"}),
            },
        ),
        section(
            "SlimLLM, table 5: α of the ratios",
            "α",
            [0.5],
            {f"{alpha:g}": slimllm(allocation={"alpha": alpha}) for alpha in (1.0, 4.0, 7.0, 10.0)},
        ),
        section(
            "SlimLLM, table 6: linear regression",
            "variant",
            [0.2, 0.5],
            {"with": slimllm(), "without": slimllm(recovery={"layerwise": {"kind": "none"}})},
        ),
        section(
            "SlimLLM, table 7: calibration windows of 128 tokens",
            "windows",
            [0.5],
            {
                str(samples): replace(slimllm(), samples=samples, sequence_length=128)
                for samples in (1, 4, 8, 16, 32, 64)
            },
        ),
    ]
