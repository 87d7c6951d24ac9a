"""What Torch-Pruning and onnxsim make of a model, for `python -m benchmarks.prune --beside FOLDER`.

    pip install torch torch-pruning onnx2torch onnxsim
    python benchmarks/prune_others.py model.onnx calib.npz FOLDER --remains 0.5

Needs nothing of this project, so that it runs in an environment of its own. Each tool is asked for a rate of channels,
bisected until no more than the wanted share of the FLOPs remains. Torch-Pruning works on the model as onnx2torch reads
it, where convolutions that write into a residual sum keep their outputs (its whole-network mode breaks zero-padded
shortcuts); its importances are L1 and L2 norms of filters, over all layers at once.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx


def main() -> None:
    """Write one file for each tool, importance and share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calib", type=Path, help="npz with the model's inputs")
    parser.add_argument("folder", type=Path, help="where the pruned models go")
    parser.add_argument("--remains", type=float, nargs="+", default=[0.5], help="shares of the FLOPs that remain")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    model = onnx.load(arguments.model)
    inputs = {value.name for value in model.graph.input}
    with np.load(arguments.calib) as calib:
        feeds = {name: calib[name] for name in inputs}
    whole = flops(model)
    for name, prune in tools(model, feeds).items():
        for share in arguments.remains:
            low, high, best = 0.0, 0.95, None
            for _ in range(7):
                middle = (low + high) / 2
                made = prune(middle)
                if flops(made) <= share * whole:
                    high, best = middle, made
                else:
                    low = middle
            if best is None:
                print(f"{name}: no rate leaves {share:.0%}")
                continue
            onnx.save(best, arguments.folder / f"{name}-{share:.0%}.onnx")
            print(f"{name}: rate {high:.3f} leaves {flops(best) / whole:.1%}")


def tools(model: onnx.ModelProto, feeds: dict[str, Any]) -> dict[str, Callable[[float], onnx.ModelProto]]:
    """By name, what prunes at a rate."""
    import onnxsim

    samples = [{name: array[start : start + 64] for name, array in feeds.items()} for start in range(0, 1024, 64)]
    return {
        "torch-pruning-l1": lambda rate: torch_pruned(model, feeds, rate, 1),
        "torch-pruning-l2": lambda rate: torch_pruned(model, feeds, rate, 2),
        "onnxsim-l2": lambda rate: onnxsim.apply_structured_pruning(model, sparsity=rate),
        "onnxsim-wanda": lambda rate: onnxsim.apply_structured_wanda_pruning(model, samples, sparsity=rate),
    }


def torch_pruned(model: onnx.ModelProto, feeds: dict[str, Any], rate: float, norm: int) -> onnx.ModelProto:
    """By Torch-Pruning's global BasePruner."""
    import io

    import onnx2torch
    import torch
    import torch_pruning

    network = onnx2torch.convert(model).eval()
    example = tuple(torch.from_numpy(array[:1]) for array in feeds.values())
    summed = {id(node) for node in kept_whole(network)}
    pruner = torch_pruning.pruner.BasePruner(
        network, example, importance=torch_pruning.importance.MagnitudeImportance(p=norm), pruning_ratio=rate,
        global_pruning=True, ignored_layers=[module for module in network.modules() if id(module) in summed],
    )  # fmt: skip
    pruner.step()
    file = io.BytesIO()
    names = [value.name for value in model.graph.input], [value.name for value in model.graph.output]
    axes = {name: {0: "batch"} for name in (*names[0], *names[1])}
    torch.onnx.export(
        network, example, file, input_names=names[0], output_names=names[1], dynamic_axes=axes, dynamo=False,
        opset_version=17,
    )  # fmt: skip
    return onnx.load_from_string(file.getvalue())


def kept_whole(network: Any) -> list[Any]:
    """The modules whose output is no other convolution's input through functions of one operand: they stay as wide."""
    found = []
    modules = dict(network.named_modules())
    for node in network.graph.nodes:
        module = modules.get(str(node.target))
        if type(module).__name__ not in {"Conv2d", "Linear"}:
            continue
        readers = list(node.users)
        while len(readers) == 1 and "relu" in type(modules.get(str(readers[0].target))).__name__.lower():
            readers = list(readers[0].users)
        if [type(modules.get(str(reader.target))).__name__ for reader in readers] != ["Conv2d"]:
            found.append(module)
    return found


def flops(model: onnx.ModelProto) -> float:
    """Multiplications of convolutions and Gemm, by shape inference at batch 1."""
    clone = onnx.ModelProto()
    clone.CopyFrom(model)
    for value in clone.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    shaped = onnx.shape_inference.infer_shapes(clone, data_prop=True)
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*shaped.graph.value_info, *shaped.graph.output]
    }
    weights = {tensor.name: list(tensor.dims) for tensor in shaped.graph.initializer}
    total = 0.0
    for node in shaped.graph.node:
        if node.op_type == "Conv":
            total += float(np.prod(weights[node.input[1]])) * float(np.prod(shapes[node.output[0]][2:]))
        elif node.op_type == "Gemm":
            total += float(np.prod(weights[node.input[1]]))
    return total


if __name__ == "__main__":
    main()
