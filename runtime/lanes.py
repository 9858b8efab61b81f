"""Pictures that take their steps together, and come and go between steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

from PIL.Image import Image

from allaprima.runtime.painting import Painting
from allaprima.runtime.stages import Denoiser


class Lanes:
    """Pictures of one shape, each at its own row of its own sampler's table.

    A picture is the same as if it were alone, whoever comes and goes. There is a denoiser for each number of
    lanes that was needed so far; where a backend wants few shapes, `sizes` says which there are, and lanes
    that are too many idle.
    """

    def __init__(self, make: Callable[[int], Denoiser], sizes: Sequence[int] | None = None) -> None:
        """`make` makes a denoiser of so many lanes; `sizes` None is every number."""
        self._make = make
        self._sizes = None if sizes is None else sorted(sizes)
        self._denoisers: dict[int, Denoiser] = {}
        self._present: Denoiser | None = None
        self._lanes: list[Painting | None] = []  # of the present denoiser
        self._paintings: list[Painting] = []

    @property
    def paintings(self) -> tuple[Painting, ...]:
        """Those that take the next step."""
        return tuple(self._paintings)

    @property
    def newcomers(self) -> tuple[Painting, ...]:
        """Those of them that have no lane yet."""
        return tuple(painting for painting in self._paintings if painting not in self._lanes)

    def admit(self, painting: Painting) -> None:
        """Let a picture take part from the next step on."""
        self._paintings.append(painting)

    def release(self, painting: Painting) -> None:
        """Let a picture go; its state is as after its last step."""
        self._paintings.remove(painting)
        if painting in self._lanes:
            lane = self._lanes.index(painting)
            assert self._present is not None
            painting.state.take(0, self._present, lane)
            self._lanes[lane] = None

    def step(self) -> tuple[tuple[Painting, Image], ...]:
        """One step for all; returns the previews that are due.

        Raises BackendError; then latents and rows are as before,
        but noise that was drawn for the step is gone.
        """
        started = perf_counter()
        denoiser = self._arrange()
        drawn = False
        for lane, painting in self._taken():
            table, row = painting.table, painting.row
            denoiser.write(table, row, lane)
            if table.draws[row]:
                painting.draws.fill(denoiser.noise[lane : lane + 1], float(table.echoes[row]))
                drawn = True
        if drawn:
            denoiser.push_noise()
        denoiser.step()
        previews = self._look(denoiser)
        share = (perf_counter() - started) / len(self._paintings)
        for painting in self._paintings:
            painting.row += 1
            painting.denoising += share
        return previews

    def drop(self) -> None:
        """Let go of the denoisers; those who take part keep their state."""
        for painting in self._paintings:
            if painting in self._lanes and self._present is not None:
                painting.state.take(0, self._present, self._lanes.index(painting))
        if self._present is not None:
            self._present.retire()
        self._denoisers.clear()
        self._present, self._lanes = None, []

    def _taken(self) -> list[tuple[int, Painting]]:
        return [(lane, painting) for lane, painting in enumerate(self._lanes) if painting is not None]

    def _arrange(self) -> Denoiser:
        """The denoiser for those who take part, each in a lane of it."""
        size = self._size(len(self._paintings))
        if size not in self._denoisers:
            self._denoisers[size] = self._make(size)
        denoiser, before = self._denoisers[size], self._present
        if denoiser is not before:
            lanes: list[Painting | None] = [None] * size
            for lane, (old, painting) in enumerate(self._taken()):
                assert before is not None
                denoiser.take(lane, before, old)
                lanes[lane] = painting
            self._present, self._lanes = denoiser, lanes
        for painting in self._paintings:
            if painting not in self._lanes:
                lane = self._lanes.index(None)
                denoiser.take(lane, painting.state, 0)
                self._lanes[lane] = painting
        for lane, resident in enumerate(self._lanes):
            if resident is None:
                denoiser.rest(lane)
        return denoiser

    def _size(self, count: int) -> int:
        if self._sizes is None:
            return count
        return next(size for size in self._sizes if size >= count)

    def _look(self, denoiser: Denoiser) -> tuple[tuple[Painting, Image], ...]:
        """After a step: put back what masks keep, and paint previews."""
        masked = [
            (lane, painting.kept, painting.table.levels, painting.row)
            for lane, painting in self._taken()
            if painting.kept is not None and painting.table.levels is not None
        ]
        watched = [
            (lane, painting)
            for lane, painting in self._taken()
            if painting.previewer is not None and painting.previewer.due(painting.row)
        ]
        if masked or watched:
            denoiser.pull()
        for lane, kept, levels, row in masked:
            kept.restore(denoiser.sample[lane : lane + 1], levels, row)
        if masked:
            denoiser.push()
        previews = []
        for lane, painting in watched:
            assert painting.previewer is not None
            only = slice(lane, lane + 1)
            (image,) = painting.previewer.show(
                denoiser.sample[only], denoiser.history[0, only], painting.table, painting.row
            )
            previews.append((painting, image))
        return tuple(previews)


def powers_of_two(most: int) -> tuple[int, ...]:
    """1, 2, 4 and so on, and `most` at last."""
    powers = (1 << exponent for exponent in range(most.bit_length()))
    return (*(power for power in powers if power < most), most)
