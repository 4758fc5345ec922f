"""A GPU that is not there: tensors that say they are on "cuda", hold their values on the CPU, and note every wait.

torch's own FakeTensorMode has such tensors too, but no backward in a build without CUDA: autograd asks for a guard of
the device, which is compiled in. For the device "meta" it needs none. So a tensor of ours is a wrapper that autograd
takes for a meta tensor and Python for a CUDA one, around the CPU tensor with its values: what runs can be compared
with the CPU, number by number.

    with Gpu() as gpu:
        model.to("cuda")
        loss = model(**gpu.put(batch)).loss
        loss.backward()
    assert gpu.waits == []

A tensor on the CPU beside one on the GPU raises RuntimeError, as it does there, and what the host would wait for is
noted: reading a value, a result whose shape depends on values, a copy between host and device (but for one out of
pinned memory with non_blocking=True).

What it cannot tell: whether a kernel exists for a dtype on CUDA, which of them attention takes, precision, memory and
time. Under autocast (`autocast`) products alone are cast.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import dlpack
from torch.utils._python_dispatch import TorchDispatchMode

import elision

LIBRARY = f"{Path(elision.__file__).parent}/"
DEVICE, _META = torch.device("cuda", 0), torch.device("meta")
_WAITS = ("equal", "repeat_interleave", "bincount", "linalg_cholesky_ex", "linalg_qr", "_linalg_svd", "_linalg_eigh")
_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
_PRODUCTS = {F.linear, F.scaled_dot_product_attention, torch.matmul, torch.mm, torch.bmm}
_PRODUCTS |= {Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__}


class OnGpu(torch.Tensor):
    """A tensor on the GPU; `values` has what is in it."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Self:
        found = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, values.shape, values.stride(), values.storage_offset(), dtype=values.dtype, device=_META
        )
        found.values = values
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise AssertionError(f"{func} on a GPU tensor outside of `with Gpu()`")

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: OnGpu) -> None:
        torch.Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.values = other.values

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def untyped_storage(self) -> Any:
        return self.values.untyped_storage()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.values!r})"


class Gpu:
    """While entered, "cuda" is there. `waits` are the operations that the host waited for, with their places."""

    def __init__(self) -> None:
        self.waits: list[str] = []
        self._modes = (_Devices(self), _Run(self))

    def __enter__(self) -> Self:
        self._before: Any = torch.cuda._lazy_init, torch.cuda.synchronize, dlpack.to_dlpack, dlpack.from_dlpack  # type: ignore[attr-defined]
        torch.cuda._lazy_init = lambda: None  # which C++ calls before it asks for a tensor there
        torch.cuda.synchronize = lambda device=None: self.wait("synchronize")
        # of C++ too, which finds no memory in a wrapper
        dlpack.to_dlpack = lambda x: x if isinstance(x, OnGpu) else self._before[2](x)  # type: ignore[attr-defined]
        dlpack.from_dlpack = self._from_dlpack
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)
        torch.cuda._lazy_init, torch.cuda.synchronize, dlpack.to_dlpack, dlpack.from_dlpack = self._before  # type: ignore[attr-defined]

    def put(self, batch: Mapping[str, Any], *but: str) -> dict[str, Any]:
        """`batch` on the GPU, but for the tensors of those names."""
        return {n: OnGpu(t) if isinstance(t, Tensor) and n not in but else t for n, t in batch.items()}

    def _from_dlpack(self, x: Any) -> Tensor:
        _, _, pack, unpack = self._before
        return OnGpu(unpack(pack(x.values))) if isinstance(x, OnGpu) else unpack(x)

    def wait(self, what: str) -> None:
        """Note that the host waits, and where the innermost line of the library is that asked for it."""
        frame = inspect.currentframe()
        while frame is not None and not frame.f_code.co_filename.startswith(LIBRARY):
            frame = frame.f_back
        code = None if frame is None else frame.f_code
        place = "outside" if code is None else f"{code.co_filename.removeprefix(LIBRARY)} {code.co_name}"
        self.waits.append(f"{what}: {place}")


@contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """torch.autocast("cuda", dtype), which switches itself off where CUDA is missing."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def values(x: Any) -> Any:
    """What is in a tensor, wherever it is; anything else as it is."""
    return x.values if isinstance(x, OnGpu) else x


def _each(function: Callable[[Any], Any], x: Any) -> Any:
    """`function` of everything in nested lists, tuples and dicts: pytrees know more, and take most of a test's time."""
    if isinstance(x, (list, tuple)):
        return type(x)([_each(function, item) for item in x])
    return {name: _each(function, item) for name, item in x.items()} if isinstance(x, dict) else function(x)


def _tensors(x: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _each(lambda item: found.append(item) if isinstance(item, Tensor) else None, x)
    return found


class _Devices(TorchFunctionMode):
    """Calls with the device that autograd knows, before C++ looks for CUDA."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        if func is torch.Tensor.pin_memory:
            pinned = args[0].clone()
            pinned.pinned = True
            return pinned
        if func in (torch.tensor, torch.as_tensor) and _is_gpu(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(_META)
        if func in (torch.Tensor.tolist, torch.Tensor.__len__) and isinstance(args[0], OnGpu):
            if func is torch.Tensor.tolist:
                self.gpu.wait("tolist")
            return func(args[0].values)
        if func in _PRODUCTS and torch.is_autocast_enabled("cuda"):
            args = tuple(_cast(arg, torch.get_autocast_dtype("cuda")) for arg in args)
        named = {name: _META if _is_gpu(arg) else arg for name, arg in kwargs.items()}
        return func(*(_META if _is_gpu(arg) else arg for arg in args), **named)


def _is_gpu(x: Any) -> bool:
    return (isinstance(x, torch.device) and x.type == "cuda") or (isinstance(x, str) and x in ("cuda", "cuda:0"))


def _cast(x: Any, dtype: torch.dtype) -> Any:
    wide = isinstance(x, OnGpu) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(dtype) if wide else x


class _Run(TorchDispatchMode):
    """Every operation, on the values."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        ours = [x for x in _tensors((args, kwargs)) if isinstance(x, OnGpu)]
        device = kwargs.get("device")
        made_there = device is not None and device.type in (
            "meta",
            "cuda",
        )  # cuda: within torch's functions, modes rest
        if not ours and not made_there:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "copy_":
            self._copied(args[1], isinstance(args[0], OnGpu), len(args) > 2 and args[2])
        elif name == "_to_copy":
            self._copied(args[0], bool(ours) if device is None else made_there, kwargs.get("non_blocking", False))
        elif ours:
            self._check(func, name, args, kwargs)
        there = {id(x.values): x for x in ours}
        given = {**kwargs, "device": torch.device("cpu")} if made_there else kwargs
        out = func(*_each(values, args), **_each(values, given))
        if device is not None and not made_there:
            return out
        return _each(lambda x: there.get(id(x), OnGpu(x)) if isinstance(x, Tensor) else x, out)  # in place: itself

    def _copied(self, source: Tensor, to_gpu: bool, soon: bool) -> None:
        if isinstance(source, OnGpu) and not to_gpu:
            self.gpu.wait("to the host")
        elif to_gpu and not isinstance(source, OnGpu) and not (soon and getattr(source, "pinned", False)):
            self.gpu.wait("to the GPU")

    def _check(self, func: Any, name: str, args: tuple, kwargs: dict) -> None:
        tensors = _tensors((args, kwargs))
        if name in _INDEXED:
            indices = [x for x in args[1] if x is not None]
            if any(x.dtype == torch.bool for x in indices):
                self.gpu.wait(f"{name} by a mask")
            if any(not isinstance(x, OnGpu) for x in indices):
                self.gpu.wait(f"{name} by indices of the host")
            tensors = _tensors((args[0], args[2:]))
        elif name in _WAITS or not _DEPENDENT.isdisjoint(func.tags):
            self.gpu.wait(name)
        for x in tensors:
            if not isinstance(x, OnGpu) and not (
                x.ndim == 0 and (torch.Tag.pointwise in func.tags or name in _INDEXED)
            ):
                raise RuntimeError(f"{func}: expected all tensors on one device, found cuda:0 and {x.device}")
