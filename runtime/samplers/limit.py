"""What is not linear in a step: how far a predicted clean sample may go."""

from dataclasses import dataclass

from allaprima.bundle.errors import RequestError
from allaprima.runtime.schedule import Training

NO_BOUND = 3e38  # finite in float32, so a clamp to it changes nothing
NO_RATIO = -1.0


@dataclass(frozen=True)
class Limit:
    """A clamp to ±``bound``, or dynamic thresholding (Saharia et al. 2022, section 2.3) if ``ratio`` is not
    negative.

    Thresholding clamps to ±s and divides by s, where s is the quantile ``ratio`` of the absolute values of a
    sample, but at least 1 and at most ``most``.
    """

    bound: float = NO_BOUND
    ratio: float = NO_RATIO
    most: float = 1.0


UNLIMITED = Limit()


@dataclass(frozen=True)
class Thresholding(Training):
    """The fields of the schedulers that can threshold."""

    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0

    @property
    def limit(self) -> Limit:
        """What the options ask for; RequestError if they are out of range."""
        if not self.thresholding:
            return UNLIMITED
        ratio, most = self.dynamic_thresholding_ratio, self.sample_max_value
        if not 0 <= ratio <= 1:
            raise RequestError(
                f"scheduler option dynamic_thresholding_ratio={ratio} is out of range: it is a share, 0 to 1"
            )
        if not 0 < most < NO_BOUND:
            raise RequestError(f"scheduler option sample_max_value={most} is out of range: it is positive")
        # What can only be 1, whatever the quantile, is a clamp, which every graph has.
        return Limit(1.0) if most == 1 else Limit(ratio=ratio, most=most)


@dataclass(frozen=True)
class Clipping(Thresholding):
    """The fields of the schedulers that can also clamp; thresholding goes before."""

    clip_sample: bool = True
    clip_sample_range: float = 1.0

    @property
    def limit(self) -> Limit:
        """As of Thresholding."""
        if self.thresholding:
            return super().limit
        return clip(self.clip_sample_range) if self.clip_sample else UNLIMITED


def clip(bound: float) -> Limit:
    """A clamp; RequestError if it leaves nothing."""
    if not bound > 0:
        raise RequestError(f"scheduler option clip_sample_range={bound} is out of range: it is positive")
    return Limit(min(bound, NO_BOUND))
