"""Stand-ins for what transformers' constructors call: torch's modules and tensors as shapes, and anything else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


class NotUnderstood(Exception):
    """The constructors do something that the stand-ins can't follow."""


@dataclass(frozen=True)
class Parameter:
    """A parameter: its full name in the model, its shape, and the kind of module that owns it."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Anything:
    """Stands for whatever has no parameters: functions, caches, buffers, other libraries."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return ANYTHING

    def __call__(self, *_: Any, **__: Any) -> Any:
        return ANYTHING

    def __getitem__(self, _: Any) -> Any:
        return ANYTHING

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __bool__(self) -> bool:
        return False

    def __mro_entries__(self, _: Any) -> tuple[type, ...]:
        return ()


def _through(*_: Any) -> Any:
    return ANYTHING


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "or", "and", "matmul", "lshift"):
    setattr(Anything, f"__{_name}__", _through)
    setattr(Anything, f"__r{_name}__", _through)
for _name in ("neg", "pos", "invert"):
    setattr(Anything, f"__{_name}__", _through)
for _name in ("lt", "le", "gt", "ge"):
    setattr(Anything, f"__{_name}__", lambda *_: False)
ANYTHING: Any = Anything()


class _Tensor:
    """A shape; arithmetic with numbers keeps it."""

    def __init__(self, *shape: Any) -> None:
        if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
            shape = tuple(shape[0])
        self.shape: tuple[Any, ...] = shape

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: self

    def _same(self, *_: Any) -> _Tensor:
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _same
    __neg__ = __pow__ = __rpow__ = __floordiv__ = __rfloordiv__ = __mod__ = _same

    def __getitem__(self, _: Any) -> Any:
        return ANYTHING


def _tensor_of(*shape: Any, size: Any = None, **_: Any) -> _Tensor:
    return _Tensor(*(shape if size is None else (size,)))


def _filled(shape: Any, *_: Any, **__: Any) -> _Tensor:
    return _Tensor(shape)


def _steps(*bounds: Any, **_: Any) -> Any:
    if not all(isinstance(bound, int) for bound in bounds):
        return ANYTHING
    return _Tensor(len(range(*bounds)))


class _Parameter:
    def __init__(self, data: Any = None, requires_grad: bool = True) -> None:
        self.shape: tuple[Any, ...] = data.shape if isinstance(data, (_Tensor, _Parameter)) else (None,)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return ANYTHING


class Module:
    """Stands for torch's Module: keeps children and parameters in the order in which they are set."""

    base_model_prefix: Any = ""
    config: Any

    def __init__(self, *_: Any, **__: Any) -> None:
        self._prepare()

    def _prepare(self) -> None:
        if "_children" not in vars(self):
            vars(self)["_children"], vars(self)["_own"] = {}, {}

    def __setattr__(self, name: str, value: Any) -> None:
        self._prepare()
        self._children.pop(name, None)
        self._own.pop(name, None)
        if isinstance(value, Module):
            self._children[name] = value
        elif isinstance(value, _Parameter):
            self._own[name] = value
        vars(self)[name] = value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_children", "_own"):
            raise AttributeError(name)
        return ANYTHING

    def __call__(self, *_: Any, **__: Any) -> Any:
        return ANYTHING

    def register_parameter(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def add_module(self, name: str, module: Any) -> None:
        setattr(self, name, module)

    register_module = add_module

    def register_buffer(self, *_: Any, **__: Any) -> None: ...
    def post_init(self) -> None: ...

    def walk(self, path: str) -> Iterator[tuple[str, Module]]:
        yield path, self
        for name, module in self._children.items():
            yield from module.walk(f"{path}.{name}" if path else name)

    def named(self) -> Iterator[Parameter]:
        """Parameters by full name, a shared module's once."""
        seen: set[int] = set()
        for path, module in self.walk(""):
            for name, parameter in module._own.items():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield Parameter(f"{path}.{name}" if path else name, tuple(parameter.shape), type(module).__name__)


class Linear(Module):
    def __init__(self, in_features: Any, out_features: Any, bias: Any = True, **_: Any) -> None:
        self.weight = _Parameter(_Tensor(out_features, in_features))
        if bias:
            self.bias = _Parameter(_Tensor(out_features))


class Conv1D(Module):
    """transformers' own, of GPT-2: weight (in, out)."""

    def __init__(self, nf: Any, nx: Any) -> None:
        self.weight = _Parameter(_Tensor(nx, nf))
        self.bias = _Parameter(_Tensor(nf))


class Embedding(Module):
    def __init__(self, num_embeddings: Any, embedding_dim: Any, *_: Any, **__: Any) -> None:
        self.weight = _Parameter(_Tensor(num_embeddings, embedding_dim))


class LayerNorm(Module):
    def __init__(
        self, normalized_shape: Any, eps: Any = 0, elementwise_affine: Any = True, bias: Any = True, **_: Any
    ) -> None:
        if elementwise_affine:
            self.weight = _Parameter(_Tensor(normalized_shape))
            if bias:
                self.bias = _Parameter(_Tensor(normalized_shape))


class RMSNorm(Module):
    def __init__(self, normalized_shape: Any, eps: Any = None, elementwise_affine: Any = True, **_: Any) -> None:
        if elementwise_affine:
            self.weight = _Parameter(_Tensor(normalized_shape))


class GroupNorm(Module):
    def __init__(self, groups: Any, channels: Any, eps: Any = 0, affine: Any = True, **_: Any) -> None:
        if affine:
            self.weight, self.bias = _Parameter(_Tensor(channels)), _Parameter(_Tensor(channels))


class _Convolution(Module):
    dimensions = 1

    def __init__(
        self, in_channels: Any, out_channels: Any, kernel_size: Any, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: Any = 1, bias: Any = True, **_: Any,
    ) -> None:  # fmt: skip
        kernel = kernel_size if isinstance(kernel_size, (tuple, list)) else (kernel_size,) * self.dimensions
        self.weight = _Parameter(_Tensor(out_channels, in_channels // groups, *kernel))
        if bias:
            self.bias = _Parameter(_Tensor(out_channels))


class Conv1d(_Convolution):
    dimensions = 1


class Conv2d(_Convolution):
    dimensions = 2


class Conv3d(_Convolution):
    dimensions = 3


class _ModuleList(Module):
    def __init__(self, modules: Any = ()) -> None:
        self._prepare()
        self.extend(modules)

    def append(self, module: Any) -> Any:
        setattr(self, str(len(self._children)), module)
        return self

    def extend(self, modules: Any) -> Any:
        for module in modules:
            if not isinstance(module, (Module, _Parameter)):
                raise NotUnderstood
            setattr(self, str(len(self._children) + len(self._own)), module)
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter([*self._children.values(), *self._own.values()])

    def __len__(self) -> int:
        return len(self._children) + len(self._own)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]


class _Sequential(_ModuleList):
    def __init__(self, *modules: Any) -> None:
        if len(modules) == 1 and isinstance(modules[0], dict):
            self._prepare()
            for name, module in modules[0].items():
                setattr(self, name, module)
        else:
            super().__init__(modules)


class _ModuleDict(Module):
    def __init__(self, modules: Any = ()) -> None:
        self._prepare()
        for name, module in dict(modules).items():
            setattr(self, name, module)

    def __setitem__(self, name: str, module: Any) -> None:
        setattr(self, name, module)

    def __getitem__(self, name: str) -> Any:
        return self._children[name]

    def update(self, modules: Any) -> None:
        for name, module in dict(modules).items():
            setattr(self, name, module)


class _Library:
    """Stands for `torch` or `torch.nn`: what is listed, functions for lower-case names, an error for other modules."""

    def __init__(self, known: Mapping[str, Any], harmless: frozenset[str] = frozenset()) -> None:
        vars(self).update(known)
        vars(self)["_harmless"] = harmless

    def __getattr__(self, name: str) -> Any:
        if name[:1].isupper() and name not in self._harmless and not name.endswith(("Tensor", "Loss", "Error")):
            raise NotUnderstood(name)
        return ANYTHING


_EMPTY_MODULES = (
    "Dropout", "Dropout1d", "Dropout2d", "Identity", "SiLU", "GELU", "ReLU", "Tanh", "Sigmoid", "Softmax", "Softplus",
    "AvgPool1d", "LeakyReLU", "MaxPool1d", "Upsample", "GLU", "ZeroPad2d", "Unfold", "Fold", "Flatten", "MaxPool2d",
    "AvgPool2d", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "PixelShuffle", "ReLU6", "Hardtanh", "ELU", "Mish",
    "LogSoftmax",
)  # fmt: skip
NN = _Library(
    {
        "Module": Module, "Linear": Linear, "Embedding": Embedding, "LayerNorm": LayerNorm, "RMSNorm": RMSNorm,
        "GroupNorm": GroupNorm, "Conv1d": Conv1d, "Conv2d": Conv2d, "Conv3d": Conv3d, "ModuleList": _ModuleList,
        "ParameterList": _ModuleList, "Sequential": _Sequential, "ModuleDict": _ModuleDict, "Parameter": _Parameter,
        **{name: type(name, (Module,), {}) for name in _EMPTY_MODULES}, "Buffer": Anything,
    }
)  # fmt: skip
TORCH = _Library(
    {
        "nn": NN, "empty": _tensor_of, "zeros": _tensor_of, "ones": _tensor_of, "randn": _tensor_of,
        "rand": _tensor_of, "full": _filled, "arange": _steps, "Tensor": _Tensor,
    },
    frozenset({"Size", "Generator", "FloatTensor", "LongTensor"}),
)  # fmt: skip


class PreTrained(Module):
    """Stands for transformers' PreTrainedModel."""

    def __init__(self, config: Any, *_: Any, **__: Any) -> None:
        self._prepare()
        vars(self)["config"] = config

    @classmethod
    def _from_config(cls, config: Any, **_: Any) -> Any:
        return cls(config)


class Config:
    """Stands for PreTrainedConfig: values by name, the family's own names included."""

    attribute_map: Mapping[str, str] = {}

    def __init__(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        vars(self)[self.attribute_map.get(name, name)] = value

    def __getattr__(self, name: str) -> Any:
        own = type(self).attribute_map.get(name)
        if own is not None and own in vars(self):
            return vars(self)[own]
        raise AttributeError(name)

    def __post_init__(self, **_: Any) -> None: ...

    def get_text_config(self, **_: Any) -> Config:
        return self

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def standardize_rope_params(self) -> None: ...
    def validate_rope(self, **_: Any) -> None: ...
    def convert_rope_params_to_dict(self, **kwargs: Any) -> Any:
        return kwargs

    def update(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, value)
