"""The workshop: what the one thread that owns the device does, a turn at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import perf_counter

from allaprima.runtime import Pipeline, Result, Settings
from allaprima.runtime.painting import Painting
from allaprima.serve.begun import Begun, Preparing, together, told
from allaprima.serve.desk import Desk
from allaprima.serve.groups import Groups, Size
from allaprima.serve.jobs import ENDED, Job
from allaprima.serve.loader import Loader
from allaprima.serve.shelf import Shelf, Shelved
from allaprima.serve.watch import Watch

MOST_FINISHED = 16
"""Pictures that may wait for the decoder; if there are more, steps wait for them."""
MOST_GROUPS = 8
"""Sizes (and kinds of guidance) that are painted by turns; others wait until one of them is done."""


class Workshop:
    """Prepares, steps and decodes. For one thread alone, but for `lanes_taken`."""

    def __init__(
        self,
        shelf: Shelf,
        desk: Desk,
        loader: Loader,
        watch: Watch,
        *,
        joins: bool = True,
    ) -> None:
        """See Studio."""
        self._shelf, self._desk, self._loader, self._watch = shelf, desk, loader, watch
        self._joins = joins
        self._groups = Groups()
        self._begun: dict[Job, Begun] = {}
        self._preparing: Preparing | None = None
        self._finished: deque[tuple[Begun, Painting]] = deque()
        self._allowance = 0.0  # seconds of the last step, which others may take between two
        self._warm = False
        shelf.before_unload = self._unload

    @property
    def warm(self) -> bool:
        """Whether the default model is loaded and its lanes are measured, so that pictures are painted."""
        return self._warm

    def lanes_taken(self) -> dict[Size, int]:
        """Pictures that are being painted, by model and size."""
        sizes = [group.size for group in self._groups.busy]
        return {size: self._groups.lanes_taken(size) for size in sizes}

    def turn(self) -> bool:
        """End what was cancelled, decode, prepare, and take one step; whether there was anything to do.

        And one of a model that is measured; before it is warm only that. Raises AllaprimaError if the default
        model cannot be loaded.
        """
        self._sweep()
        if not self._warm:
            self._warm = self._loader.ask(self._shelf.find(None), lambda _: False) is not None
            return self._warm or self._loader.turn()
        decoded = self._within_allowance(self._decode_one)
        while len(self._finished) > MOST_FINISHED and self._decode_one():
            pass
        prepared = self._within_allowance(self._prepare_one)
        measured = self._loader.turn()
        return self._step() or decoded or prepared or measured

    def _within_allowance(self, work: Callable[[], bool]) -> bool:
        """Do it at least once, and again while it takes no longer than a step; whether it did anything."""
        until = perf_counter() + self._allowance
        did = False
        while work():
            did = True
            if self._joins and perf_counter() >= until:
                break
        return did

    def _sweep(self) -> None:
        for job, reason in self._desk.interrupted():
            self._end(job, reason)
        for job in [each for each in self._begun if each.status.state in ENDED]:
            self._discard(job)

    def _prepare_one(self) -> bool:
        """Go on with the picture that is being prepared, else with the oldest for which there is a lane.

        False if there is none.
        """
        if self._preparing is not None:
            return self._go_on_preparing(self._preparing)
        for begun in list(self._begun.values()):
            if begun.waiting and self._room(begun.model, begun.waiting[0][1]):
                return self._prepare(begun)
        for job in self._desk.queue:
            model = self._shelf.find(job.model)
            if self._full(model, job.settings):
                return False  # those behind it would keep it waiting for ever
            if self._room(model, job.settings) and (began := self._begin(job, model)) is not None:
                return began
        return False

    def _begin(self, job: Job, model: Shelved) -> bool | None:
        """Prepare the first picture of a job that waits.

        None if its model is on its way, False if it has no room until all that runs with another is done.
        """
        painted = {begun.model for begun in self._begun.values()}
        try:
            pipeline = self._loader.ask(model, lambda other: other not in painted)
            if pipeline is None:
                return None if self._loader.coming(model) else False
            settings = pipeline.settle(job.settings)
        except Exception as error:
            self._end(job, told(error))
            return True
        if not self._desk.begin(job):
            return True
        begun = self._begun[job] = Begun(job, model, deque(enumerate(settings)))
        return self._prepare(begun)

    def _prepare(self, begun: Begun) -> bool:
        index, settings = begun.waiting.popleft()
        parts = self._pipeline(begun.model).prepare_in_parts(
            settings, preview_every=begun.job.order.preview_every
        )
        self._preparing = Preparing(begun, index, parts)
        return self._go_on_preparing(self._preparing)

    def _go_on_preparing(self, preparing: Preparing) -> bool:
        """Do the next part of it; after the last one the picture takes steps with those of its kind."""
        begun, started = preparing.begun, perf_counter()
        try:
            next(preparing.parts)
            self._pipeline(begun.model).wait()  # or the next step of others would pay for it
        except StopIteration as end:
            self._preparing = None
            self._enter(preparing, end.value, started)
        except Exception as error:
            self._preparing = None
            self._end(begun.job, told(error))
        else:
            preparing.seconds += perf_counter() - started
        return True

    def _enter(self, preparing: Preparing, painting: Painting, started: float) -> None:
        begun, name = preparing.begun, preparing.begun.model.name
        shape, pipeline = painting.shape, self._pipeline(begun.model)
        most = self._loader.lanes(name, shape.height, shape.width)
        try:
            group = self._groups.enter(
                name, painting, lambda: pipeline.lanes(shape, most), self._loader.keeps(name)
            )
        except Exception as error:
            self._end(begun.job, told(error))
            return
        begun.paintings[painting] = preparing.index, group
        seconds = preparing.seconds + perf_counter() - started
        group.spent += seconds
        self._watch.staged(name, "encode", seconds)
        begun.job.update(steps=painting.rows * begun.job.settings.num_images)

    def _step(self) -> bool:
        group = self._groups.next()
        if group is None:
            return False
        present, started = group.lanes.paintings, perf_counter()
        owners = {painting: begun for begun in self._begun.values() for painting in begun.paintings}
        try:
            previews = group.lanes.step()
            self._pipeline(self._shelf.find(group.model)).wait()
        except Exception as error:
            # Perhaps there was no room for one more: then those who were there before go on without it.
            for job in {owners[painting].job for painting in group.lanes.newcomers or present}:
                self._end(job, told(error))
            return True
        seconds = perf_counter() - started
        group.spent += seconds
        self._allowance = seconds
        self._watch.stepped(*group.size, len(present), seconds)
        for painting, image in previews:
            begun = owners[painting]
            begun.job.show(image, begun.paintings[painting][0])
        for begun in dict.fromkeys(owners[painting] for painting in present):
            self._progress(begun)
        for painting in present:
            if painting.done:
                begun = owners[painting]
                self._groups.leave(group, painting)
                begun.paintings[painting] = begun.paintings[painting][0], None
                self._finished.append((begun, painting))
        return True

    def _decode_one(self) -> bool:
        if not self._finished:
            return False
        begun, painting = self._finished.popleft()
        index, _ = begun.paintings.pop(painting)
        started = perf_counter()
        try:
            result = self._pipeline(begun.model).finish(painting)
        except Exception as error:
            self._end(begun.job, told(error))
            return True
        self._watch.staged(begun.model.name, "decode", perf_counter() - started)
        self._desk.painted(result.timings["total"])
        begun.done[index] = painting, result
        if len(begun.done) == begun.job.settings.num_images:
            self._end(begun.job, together(begun))
        return True

    def _progress(self, begun: Begun) -> None:
        rows = sum(painting.row for painting in begun.paintings)
        begun.job.update(step=rows + sum(painting.rows for painting, _ in begun.done.values()))

    def _end(self, job: Job, outcome: Result | Exception) -> None:
        self._discard(job)
        self._desk.end(job, outcome)

    def _discard(self, job: Job) -> None:
        """Free the lanes of a job."""
        begun = self._begun.pop(job, None)
        if begun is None:
            return
        if self._preparing is not None and self._preparing.begun is begun:
            self._preparing = None
        for painting, (_, group) in begun.paintings.items():
            if group is not None:
                self._groups.leave(group, painting)
        self._finished = deque(each for each in self._finished if each[0] is not begun)

    def _room(self, model: Shelved, settings: Settings) -> bool:
        """Whether a picture can be painted with others of its size; one can before its model is measured."""
        size = model.name, settings.height, settings.width
        if not self._joins and any(each.row for group in self._groups.busy for each in group.lanes.paintings):
            return False
        if not self._loader.keeps(model.name) and any(each.model == model.name for each in self._groups.busy):
            return False  # its memory is for one picture at a time
        return self._groups.lanes_taken(size) < self._loader.lanes(*size)

    def _full(self, model: Shelved, settings: Settings) -> bool:
        """Whether a picture's size must wait for another one to be done."""
        size = model.name, settings.height, settings.width
        return len(self._groups.busy) >= MOST_GROUPS and not self._groups.lanes_taken(size)

    def _unload(self, model: str) -> None:
        self._groups.drop(model)
        self._loader.forget(model)

    @staticmethod
    def _pipeline(model: Shelved) -> Pipeline:
        assert model.pipeline is not None  # it is not unloaded while one of its pictures is painted
        return model.pipeline
