"""From sizes and batches to narrow profiles."""

from dataclasses import replace

import pytest

from allaprima.bundle import Bundle, BundleError, Profile, RequestError, TensorSpec
from allaprima.engine import parse_range, parse_sizes
from allaprima.engine.shapes import plan_profiles


def test_parsing() -> None:
    assert parse_sizes("512x512") == ((512, 512),)
    assert parse_sizes("512x512, 768x512,512x512") == ((512, 512), (768, 512))
    assert parse_range("4") == (4, 4)
    assert parse_range("1-4") == parse_range(" 1 - 4 ") == (1, 4)


@pytest.mark.parametrize("text", ["", "512", "512x", "512x512x3", "-64x64", "64x64,", "axb"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(RequestError, match="is no size: write WIDTHxHEIGHT"):
        parse_sizes(text)


@pytest.mark.parametrize("text", ["", "x", "1-", "1-2-3", "4-1", "0", "0-3", "-2"])
def test_ranges_that_are_none(text: str) -> None:
    with pytest.raises(RequestError, match="range"):
        parse_range(text)


def test_profiles(bundle: Bundle) -> None:
    side = bundle.manifest.latent.downscale
    step = bundle.manifest.latent.multiple
    sizes = [(2 * step, step), (step, 3 * step)]
    planned = plan_profiles(bundle, sizes, (1, 4))
    assert set(planned) == set(bundle.manifest.components)
    assert planned["text_encoder"] == (Profile({"B": (1, 2, 8)}),)
    h, w = step // side, 2 * step // side
    assert len(planned["denoiser"]) == 4
    assert dict(planned["denoiser"][0].extents) == {
        "B": (1, 1, 1),
        "H": (h, h, h),
        "W": (w, w, w),
        "G": (1, 2, 2),
        "L": (77, 77, 77),
    }
    assert planned["denoiser"][1].extents["B"] == (2, 4, 4)
    assert planned["denoiser"][2].extents["H"] == (3 * h,) * 3
    assert len(planned["vae_decoder"]) == 2
    assert {profile.extents["B"] for profile in planned["vae_decoder"]} == {(1, 1, 1)}
    assert planned["denoiser"][1].words().startswith("B 2 to 4 (best 4)")


def test_defaults_and_one_batch_size(bundle: Bundle) -> None:
    defaults = bundle.manifest.defaults
    (profile,) = plan_profiles(bundle)["denoiser"]
    assert profile.extents["W"][0] * bundle.manifest.latent.downscale == defaults.width
    (profile,) = plan_profiles(bundle, batch=(3, 3))["denoiser"]
    assert profile.extents["B"] == (3, 3, 3)
    (profile,) = plan_profiles(bundle, batch=(2, 5))["denoiser"]
    assert profile.extents["B"] == (2, 5, 5)


def test_a_size_that_the_model_cannot_paint(bundle: Bundle) -> None:
    step = bundle.manifest.latent.multiple
    with pytest.raises(RequestError, match=f"multiples of {step} pixels, as in {step}x{2 * step}"):
        plan_profiles(bundle, [(step - 1, 2 * step + 1)])


def test_prompts_are_one_chunk_or_as_many_as_asked(bundle: Bundle) -> None:
    component = bundle.component("denoiser")
    *rest, states = component.inputs
    long = replace(component, inputs=(*rest, replace(states, shape=("G*B", "L", states.shape[2]))))
    short = replace(component, inputs=(*rest, replace(states, shape=("G*B", 77, states.shape[2]))))
    for denoiser, extents in ((long, {"L": (77, 77, 77)}), (short, {})):
        components = {**bundle.manifest.components, "denoiser": denoiser}
        changed = replace(bundle, manifest=replace(bundle.manifest, components=components))
        (profile,) = plan_profiles(changed)["denoiser"]
        assert {axis: found for axis, found in profile.extents.items() if axis == "L"} == extents
        assert profile.shapes(denoiser.inputs[-1])[1] == (2, 77, states.shape[2])
        (profile,) = plan_profiles(changed, chunks=3)["denoiser"]
        assert profile.shapes(denoiser.inputs[-1])[2] == (2, 231 if extents else 77, states.shape[2])


def test_shapes_of_a_profile() -> None:
    profile = Profile({"B": (1, 2, 4), "G": (1, 2, 2), "H": (8, 8, 8)})
    spec = TensorSpec("x", "float32", ("G*B", 77, "8*H"))
    assert profile.shapes(spec) == ((1, 77, 64), (4, 77, 64), (8, 77, 64))
    assert profile.serves({"B": 3, "G": 1, "H": 8})
    assert not profile.serves({"B": 5, "G": 1, "H": 8})
    assert Profile.from_json(profile.to_json()) == profile


@pytest.mark.parametrize("extents", [(2, 1, 4), (1, 4, 2), (0, 1, 1), (1, 1)])
def test_profiles_that_contradict_themselves(extents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="axis B goes from"):
        Profile({"B": extents})
    with pytest.raises(BundleError, match="axis B goes from"):
        Profile.from_json({"extents": {"B": list(extents)}})


def test_other_profiles_are_another_engine(bundle: Bundle) -> None:
    from allaprima.bundle import engine_key

    key = engine_key(bundle, "denoiser", backend="x", backend_version="1", device="y", precision="fp32")
    other = replace(key, profiles=plan_profiles(bundle)["denoiser"])
    assert len({key.folder, other.folder, replace(other, flags={"level": "5"}).folder}) == 3


def test_a_graph_of_branches_without_a_size(bundle: Bundle) -> None:
    """A prior: its lanes are those of the pictures, and as many for negative prompts."""
    prior = replace(
        bundle.manifest.components["text_encoder"],
        inputs=(
            TensorSpec("sample", "float32", ("B", 32, 1, 1)),
            TensorSpec("guidance", "float32", ("G", "B")),
            TensorSpec("text_embeds", "float32", ("G*B", 32)),
        ),
    )
    components = {**bundle.manifest.components, "prior": prior}
    extended = replace(bundle, manifest=replace(bundle.manifest, components=components))
    assert plan_profiles(extended, batch=(1, 3))["prior"] == (Profile({"B": (1, 2, 6), "G": (1, 2, 2)}),)
