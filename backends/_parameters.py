"""Finds a module's parameters in an ONNX file: by name, else by value.

Exporters keep a parameter's name where its initialiser is the parameter, and PyTorch's newer one
also where the following batch normalisation was folded into it: what is far from the parameter of
its name may be a fold. A weight that has a name of its own is found as the parameter, transposed or
not, or the fold that it is closest to; one that is close to none as that of the linear layer or
convolution in which the exporter says it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from auditor.ports import Array, Arrays

_ALIKE = 0.1  # relative L2 up to which a constant is a changed form of a parameter


def constants(module: Any, initializers: Mapping[str, Array], readers: Mapping[str, str]) -> Arrays:
    """The module's own values of an ONNX file's initialisers, as far as they are found.

    Args:
        module: ``torch.nn.Module``.
        initializers: floats of the file, by name.
        readers: of initialisers, the path of the module whose nodes alone read them.
    """
    own = {name: _array(t) for name, t in _tensors(module)}
    found = {
        name: own[name]
        for name, value in initializers.items()
        if name in own and own[name].shape == value.shape
    }
    near = {n for n, value in found.items() if _distance(initializers[n], value) <= _ALIKE}
    rest = {n: v for n, v in initializers.items() if n not in near and v.ndim > 0 and v.size > 1}
    if not rest:
        return found
    of_modules = list(_folds(module))
    folds = [form for _, form in of_modules]
    forms = [*_forms(own), *folds]
    of_modules += _products(module)
    for name, value in rest.items():
        alike = [f for f in (folds if name in found else forms) if f.shape == value.shape]
        close = [(_distance(value, form), i) for i, form in enumerate(alike)]
        if close and min(close)[0] <= _ALIKE:
            found[name] = alike[min(close)[1]]
        elif name not in found and (reader := readers.get(name)):
            its = (f for path, f in of_modules if path == reader and f.shape == value.shape)
            if (form := next(its, None)) is not None:
                found[name] = form
    return found


def _forms(own: Mapping[str, Array]) -> Iterator[Array]:
    for value in own.values():
        yield value
        if value.ndim == 2:
            yield np.ascontiguousarray(value.T)


def _products(module: Any) -> Iterator[tuple[str, Array]]:
    """Weights and biases of linear layers and convolutions, with their paths.

    Those of linear layers first as the older exporter folds them, transposed. Weights that are
    made of other parameters, as by weight normalisation, are none.
    """
    import torch
    from torch.nn.modules.conv import _ConvNd

    for path, leaf in module.named_modules(remove_duplicate=False):
        if isinstance(leaf, (torch.nn.Linear, _ConvNd)):
            kept = dict(leaf.named_parameters(recurse=False))
            for value in (_array(kept[n]) for n in ("weight", "bias") if n in kept):
                if isinstance(leaf, torch.nn.Linear):
                    yield path, np.ascontiguousarray(value.T)
                yield path, value


def _folds(module: Any) -> Iterator[tuple[str, Array]]:
    """Weight and bias of every convolution with the batch normalisation after it folded in.

    Each with the convolution's path.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.conv import _ConvNd
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    leaves = [(n, m) for n, m in module.named_modules() if not any(True for _ in m.children())]
    for (path, conv), (_, norm) in pairwise(leaves):
        if not isinstance(conv, _ConvNd) or not isinstance(norm, _BatchNorm):
            continue
        if norm.running_mean is None or norm.running_var is None:
            continue
        if norm.num_features != conv.out_channels:
            continue
        with torch.no_grad():
            weight, bias = fuse_conv_bn_weights(
                conv.weight.double(),
                None if conv.bias is None else conv.bias.double(),
                norm.running_mean.double(),
                norm.running_var.double(),
                norm.eps,
                None if norm.weight is None else norm.weight.double(),
                None if norm.bias is None else norm.bias.double(),
                conv.transposed,
            )
        kind = _array(conv.weight).dtype
        yield path, _array(weight).astype(kind)
        yield path, _array(bias).astype(kind)


def _tensors(module: Any) -> Iterator[tuple[str, Any]]:
    for named in (module.named_parameters(), module.named_buffers()):
        yield from ((n, t) for n, t in named if t.is_floating_point())


def _array(tensor: Any) -> Array:
    import torch

    tensor = tensor.detach().cpu()
    return np.array((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())


def _distance(value: Array, form: Array) -> float:
    norm = float(np.linalg.norm(form))
    return float(np.linalg.norm(value.astype(form.dtype) - form)) / norm if norm else np.inf
