"""A whole benchmark: turns of all contestants, first pictures, the machine's rates, scenarios."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from allaprima.benchmarks import cold, loadgen
from allaprima.benchmarks.captions import Caption
from allaprima.benchmarks.contestants import Contestant
from allaprima.benchmarks.ours import own_cache
from allaprima.benchmarks.plan import Plan
from allaprima.benchmarks.process import in_new_process, reason_of
from allaprima.benchmarks.quality import compare_pictures
from allaprima.benchmarks.rates import measure_rates
from allaprima.benchmarks.result import Result, about, turn_to_json
from allaprima.benchmarks.roofline import count_bundle
from allaprima.benchmarks.scenarios import SCENARIOS, ScenarioRun, Traffic
from allaprima.benchmarks.scores import paint_all, score_captions
from allaprima.benchmarks.turns import listen, prepare, run_turn

COLD_STEPS = 4
"""Of the first picture of a process."""
Tell = Callable[[str, int, int, str], None]
"""Task, how much of it is done, of how much, and what comes now."""


@dataclass(frozen=True)
class Measured:
    """What is measured: latencies of the plan, `cold` rounds of first pictures, the roofline, scenarios.

    `captions` are painted by everybody in the most steps of the plan, and judged.
    """

    latency: bool = True
    cold: int = 3
    roofline: bool = True
    asked: Traffic | None = None
    captions: tuple[Caption, ...] = ()


class Harness:
    """Measures into a result, and hands it to `keep` after every measurement.

    A contestant that fails is listed in the result's "absent" with the reason, and not asked again.
    `reference` paints one picture that the others' are compared with, which is not measured.
    """

    def __init__(
        self,
        result: Result,
        contestants: Sequence[Contestant],
        plan: Plan,
        *,
        keep: Callable[[], object],
        tell: Tell = lambda task, done, total, note: None,
        reference: Contestant | None = None,
    ) -> None:
        self._result, self._contestants, self._plan = result, contestants, plan
        self._keep, self._tell, self._reference = keep, tell, reference
        result["contestants"] = {each.name: about(each) for each in contestants}

    def run(self, measured: Measured) -> None:
        """Measure everything, and mark the result complete."""
        with tempfile.TemporaryDirectory(prefix="allaprima-bench-") as name:
            folder = Path(name)
            if measured.latency:
                try:
                    self._rounds(folder, roofline=measured.roofline)
                    self._paint_reference(folder)
                finally:  # of an interrupted run too, as far as it came
                    self._compare(folder)
                if measured.cold:
                    self._cold(folder, measured.cold)
                if measured.roofline:
                    self._count()
            if measured.captions:
                self._captions(folder, measured.captions)
            if measured.asked is not None:
                self._scenarios(folder, measured.asked)
        self._result["complete"] = True
        self._keep()

    def _present(self) -> list[Contestant]:
        return [each for each in self._contestants if each.name not in self._result["absent"]]

    def _fail(self, contestant: Contestant, reason: str) -> None:
        self._result["absent"][contestant.name] = reason

    def _rounds(self, folder: Path, *, roofline: bool) -> None:
        total = self._plan.rounds * len(self._contestants)
        for index, contestant in enumerate(self._contestants):
            self._tell("preparation", index, len(self._contestants), contestant.name)
            self._prepare(contestant, folder)
        for number in range(self._plan.rounds):
            if roofline:
                self._rates(number)
            for index, contestant in enumerate(self._contestants):
                if contestant.name in self._result["absent"]:
                    continue
                done = number * len(self._contestants) + index
                self._tell("turns", done, total, f"round {number + 1}, {contestant.name}")
                self._turn(contestant, number, folder)

    def _prepare(self, contestant: Contestant, folder: Path) -> None:
        plan = self._plan
        try:
            prepare(
                contestant, plan.settings, plan.works, own_cache(contestant, folder / "caches"), load=True
            )
        except RuntimeError as error:
            self._fail(contestant, str(error))
            self._keep()

    def _paint_reference(self, folder: Path) -> None:
        """One picture by the reference, where there is anything to compare with it."""
        if self._reference is None or not self._present():
            return
        self._tell("reference", 0, 1, self._reference.name)
        pictures = folder / "pictures" / self._reference.name
        pictures.mkdir(parents=True, exist_ok=True)
        plan = replace(self._plan, works=(self._plan.shown(),), rounds=1, repeats=1)
        try:
            deque(run_turn(self._reference, plan, 0, cache=None, keep=pictures), maxlen=0)
        except RuntimeError as error:
            self._result["notes"].append(
                f"no picture to compare with, {self._reference.name} failed: {error}"
            )

    def _compare(self, folder: Path) -> None:
        everybody = [*self._contestants, *([self._reference] if self._reference else [])]
        self._result["quality"] = compare_pictures(everybody, self._plan, folder / "pictures")

    def _turn(self, contestant: Contestant, number: int, folder: Path) -> None:
        pictures = folder / "pictures" / contestant.name
        pictures.mkdir(parents=True, exist_ok=True)
        turns = self._result["contestants"][contestant.name]["turns"]
        kept = None
        cache = own_cache(contestant, folder / "caches")
        try:
            with closing(run_turn(contestant, self._plan, number, cache=cache, keep=pictures)) as growing:
                for turn in growing:
                    if kept is None:
                        turns.append(None)
                    kept = turns[-1] = turn_to_json(turn)
                    self._keep()
        except RuntimeError as error:
            self._fail(contestant, str(error))
            self._keep()

    def _rates(self, number: int) -> None:
        kinds = dict.fromkeys((each.backend, each.precision) for each in self._present() if each.bundle)
        for backend, precision in kinds:
            about = {"backend": backend, "precision": precision, "round": number}
            try:
                rates = in_new_process(measure_rates, backend, precision, self._plan.settings.threads)
            except Exception as error:  # no rate is no reason to measure nothing
                if number == 0:
                    self._result["rates"].append({**about, "error": f"{error}"})
            else:
                self._result["rates"].append({**about, **asdict(rates)})
            self._keep()

    def _cold(self, folder: Path, rounds: int) -> None:
        first = self._plan.works[0]
        steps = min(COLD_STEPS, max(work.steps for work in self._plan.works))
        work = replace(first, batch=1, steps=steps)
        found = cold.starters(self._present(), self._plan.settings, work, folder)
        done = 0

        def told() -> None:
            nonlocal done
            done += 1
            self._tell("cold starts", done, (rounds + 1) * len(found), "")
            self._result["cold"] = [{"steps": steps, **each.to_json()} for each in found]
            self._keep()

        cold.measure(found, rounds, folder / "picture.png", told)

    def _count(self) -> None:
        for bundle in dict.fromkeys(each.bundle for each in self._present() if each.bundle):
            shapes = [works[0] for _, works in self._plan.by_shape()]
            guidance = self._plan.settings.guidance_scale
            try:
                found = in_new_process(count_bundle, bundle, shapes, guidance)
            except ImportError as error:
                found = [{"bundle": Path(bundle).name, "error": f"{error}: pip install 'allaprima[bench]'"}]
            except Exception as error:  # no count is no reason to lose what was measured
                found = [{"bundle": Path(bundle).name, "error": reason_of(error)}]
            self._result["counts"] += found
            self._keep()

    def _captions(self, folder: Path, captions: Sequence[Caption]) -> None:
        steps = max(work.steps for work in self._plan.works)
        present = self._present()
        absent = paint_all(
            present,
            self._plan.settings,
            captions,
            steps,
            folder / "captions",
            lambda each: own_cache(each, folder / "caches"),
            lambda done, total, note: self._tell("captions", done, total, note),
        )
        self._result["absent"].update(absent)
        scores = score_captions(present, captions, folder / "captions")
        self._result["quality"]["captions"] = {"count": len(captions), "steps": steps, "scores": scores}
        self._keep()

    def _scenarios(self, folder: Path, asked: Traffic) -> None:
        asked = replace(asked, loadgen=asked.loadgen and loadgen.available())
        for index, contestant in enumerate(self._present()):
            self._tell("scenarios", index, len(self._contestants), contestant.name)
            self._ask(contestant, folder, asked)

    def _ask(self, contestant: Contestant, folder: Path, asked: Traffic) -> None:
        """All scenarios of one contestant; the server begins at the rate that it reached offline."""
        most = None
        for scenario in (name for name in SCENARIOS if name in asked.scenarios):
            cache = own_cache(contestant, folder / "caches")
            job = ScenarioRun(contestant, self._plan, scenario, asked, cache, most)
            work = {**asdict(self._plan.works[-1]), "batch": job.works[-1].batch}
            try:
                prepare(contestant, self._plan.settings, job.works, cache)
            except RuntimeError as error:  # it may well have engines for other batches
                about = {"scenario": scenario, "generator": "own", "error": str(error)}
                self._result["scenarios"].append({"contestant": contestant.name, **work, **about})
                self._keep()
                continue
            try:
                with closing(listen(job)) as said:
                    for _, found in said:
                        self._result["scenarios"].append({"contestant": contestant.name, **work, **found})
                        self._keep()
                        if (scenario, found["generator"]) == ("offline", "own"):
                            most = found["throughput"]
            except RuntimeError as error:
                self._fail(contestant, str(error))
                self._keep()
                return
