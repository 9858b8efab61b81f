"""Compiles a bundle the way TensorRT is driven, with the library of TensorRT-RTX in its place.

Both have one API, and the library of TensorRT-RTX needs no GPU. What reaches the builder goes to stdout as
JSON. Arguments: the bundle's folder.
"""

import json
import sys
from types import ModuleType
from typing import Any

from allaprima.bundle import BackendError, open_bundle
from allaprima.engine import Options, build_bundle, toolchains
from allaprima.runtime import flavours
from allaprima.runtime.cuda import Device

rtx = flavours.load("tensorrt-rtx")
seen: dict[str, Any] = {"flags": [], "configs": []}


class Builder(rtx.Builder):
    """Tells what it is asked for. Without a driver TensorRT-RTX cannot make refittable plans."""

    def create_network(self, flags: int = 0) -> Any:
        seen["flags"].append(flags)
        return super().create_network(flags)

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        seen["configs"].append(
            {
                "refit": config.get_flag(rtx.BuilderFlag.REFIT),
                "streams": config.get_flag(rtx.BuilderFlag.WEIGHT_STREAMING),
                "level": config.builder_optimization_level,
                "workspace": config.get_memory_pool_limit(rtx.MemoryPoolType.WORKSPACE),
                "profiles": config.num_optimization_profiles,
            }
        )
        config.clear_flag(rtx.BuilderFlag.REFIT)
        return super().build_serialized_network(network, config)


fake = ModuleType("tensorrt")
fake.__dict__.update(vars(rtx), __version__="11.4.0.106", Builder=Builder)
sys.modules["tensorrt"] = fake
toolchains.current_device = lambda: Device("NVIDIA H200", "9.0")  # type: ignore[assignment]
bundle = open_bundle(sys.argv[1])
options = Options(workspace=2**30, level=2, refit=True, weight_streaming=True)
built = build_bundle(bundle, backend="tensorrt", batch=(1, 2), options=options)
seen["built"] = [{**one.engine.to_json(), "folder": str(one.folder)} for one in built]
again = build_bundle(bundle, backend="tensorrt", batch=(1, 2), options=options)
seen["reused"] = [one.reused for one in again]
seen["strongly typed"] = 1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
try:
    build_bundle(bundle, backend="tensorrt-rtx")
except BackendError as error:
    seen["other"] = str(error)
sys.stdout.write(json.dumps(seen))
