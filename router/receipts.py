"""The receipt of a decision: which strategy, what each candidate scored, and why. Made only when a client asks for it
and the configuration allows that.
"""

import json
from math import isfinite
from typing import Any, Final

from router.fleet import Candidates
from router.request import RoutingRequest
from router.strategies.base import Scoring, Strategy

MAX_CANDIDATES: Final = 16
"""The best so many are listed; a receipt is 4 KB at most, unless pods have long names."""
MAX_TEXT_LENGTH: Final = 128


class Receipt:
    """Taken between `pick` and `chosen`, while the scores are still those that decided."""

    __slots__ = ("document",)

    def __init__(
        self,
        value: str,
        strategy: Strategy,
        request: RoutingRequest,
        candidates: Candidates,
        index: int,
        now: float,
    ) -> None:
        scores: list[float | None] = [None] * len(candidates)
        terms: dict[str, list[float]] = {}
        if isinstance(strategy, Scoring):
            terms = {name: of_all.tolist() for name, of_all in strategy.terms(request, candidates, now).items()}
            scores = [
                score if isfinite(score) else None for score in strategy.scores(request, candidates, now).tolist()
            ]
        requests = candidates.requests().tolist()
        matched = [round(tokens) for tokens in request.prefix.tokens()] if request.prefix is not None else None
        listed = sorted(range(len(candidates)), key=lambda i: (i != index, scores[i] is None, scores[i] or 0.0, i))
        rows: list[dict[str, Any]] = []
        for i in listed[:MAX_CANDIDATES]:
            row: dict[str, Any] = {"pod": candidates.pods[i].name[:MAX_TEXT_LENGTH], "requests": requests[i]}
            score = scores[i]
            if score is not None:
                row["score"] = float(f"{score:.6g}")
            if terms:
                row["terms"] = {name: float(f"{of_all[i]:.3g}") for name, of_all in terms.items()}
            if matched is not None:
                row["matched_tokens"] = matched[i]
            rows.append(row)
        self.document: dict[str, Any] = {
            "strategy": value[:MAX_TEXT_LENGTH],
            "model": request.model[:MAX_TEXT_LENGTH],
            "pod": candidates.pods[index].name[:MAX_TEXT_LENGTH],
            "prompt_tokens": request.prompt_tokens,
            "candidates": rows,
            "of": len(candidates),
        }

    def text(self) -> str:
        """As JSON in ASCII, fit for a header."""
        return json.dumps(self.document, separators=(",", ":"))
