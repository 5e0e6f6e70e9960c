"""What a call happens in: whether it is traced or transformed, and whether anything looks at the single ops of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

_PLAIN = {Tensor, Parameter}


def transformed() -> bool:
    """Whether the call is traced, or within a transform of torch.func or forward-mode differentiation."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def unseen(*tensors: Tensor) -> bool:
    """Whether PyTorch's dispatcher, which takes 15 microseconds, would do nothing with an op on these tensors but call
    its implementation. Not where the call is transformed, or seen by a mode, a tensor subclass or a profiler."""
    return (
        not transformed()
        and _PLAIN.issuperset(map(type, tensors))
        and not tensors[0].is_meta
        and not any(map(Tensor.is_neg, tensors))  # the dispatcher would resolve it
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
    )
