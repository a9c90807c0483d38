"""Conditions on the logged numbers that end a run before its last step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from diffalign.common.errors import nearest
from diffalign.training.specs import StopRule


@dataclass
class StopRules:
    """Reads every row as it is logged and remembers when one of the rules is met.

    Args:
        rules: number -> when it ends the run. A number is named as in metrics.jsonl, levels joined by "/":
            "saturated", "by_timestep/0-249/err_w_vs_ref", "implicit_accuracy/estimate".
        reason: what ended the run; None: nothing has.
    """

    rules: dict[str, StopRule]
    reason: str | None = None
    _in_a_row: dict[str, int] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)

    def read(self, step: int, numbers: dict[str, float]) -> None:
        """Takes one row of `{name: number}`; rows without a rule's number neither count nor break its row."""
        self._seen.update(numbers)
        for name, rule in self.rules.items():
            if name not in numbers:
                continue
            self._in_a_row[name] = self._in_a_row.get(name, 0) + 1 if rule.holds(numbers[name]) else 0
            if self._in_a_row[name] >= rule.rows and self.reason is None:
                self.reason = f"{name} {rule} at step {step}"

    def unseen(self) -> list[str]:
        """For each rule whose number no row has had so far, a line that says so."""
        lines = []
        for name in self.rules:
            if name not in self._seen:
                match = nearest(name, self._seen)
                known = f"did you mean '{match}'?" if match else f"there are {', '.join(sorted(self._seen))}"
                lines.append(f"stop_when: no row of metrics has had '{name}' so far: {known}")
        return lines

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs."""
        return {"reason": self.reason, "in_a_row": dict(self._in_a_row), "seen": sorted(self._seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self.reason, self._in_a_row = state["reason"], dict(state["in_a_row"])
        self._seen = set(state["seen"])
