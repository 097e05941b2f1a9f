"""pixels → logits on a GPU: a twin of a model in bf16, fp16 or fp8, compiled once, replayed as one CUDA graph a batch.

    resized images ── Uploader ──▶ pixels ── CudaNet ──▶ logits

    fp32        the model as it is, not compiled: call it under `device.exact_fp32`, or torch may round to TF32
    bf16, fp16  transformer layers and what makes tokens; last norm, decoder and head stay in fp32
    fp8         as bf16, and the dense layers of the transformer layers in e4m3, a scale for each row and each output

q, k and v are one product, the last layer of a Vision Transformer computes only the tokens that are read, and what a
Perceiver's latents ask of the tokens, the same for every image, is a constant. On a CPU, where all this is tested, the
same twin runs uncompiled.
"""

import copy
import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from opsin.models.front_ends import ConvStage
from opsin.models.layers import ACTIVATIONS, CrossAttentionLayer, TransformerLayer
from opsin.models.perceiver_io import ImagePerceiver
from opsin.models.vit import ViT
from opsin.preprocess import PreprocessConfig

log = logging.getLogger(__name__)

CudaPrecision = Literal["fp32", "bf16", "fp16", "fp8"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}  # of what is not in e4m3
CAPABILITY = {"bf16": (8, 0), "fp8": (8, 9)}  # at least: Ampere, Ada
E4M3_MAX = 448.0
MAX_BATCH = 512  # larger ones are run in parts

_capturing = threading.Lock()  # torch captures one graph at a time in a process


def check(precision: str, device: torch.device) -> None:
    """
    Raises:
        ValueError: an unknown precision, or one that this GPU does not multiply.
    """
    if precision not in get_args(CudaPrecision):
        raise ValueError(f'precision is "{precision}". Known on a GPU: {", ".join(get_args(CudaPrecision))}.')
    if device.type != "cuda" or precision not in CAPABILITY:
        return
    needed, found = CAPABILITY[precision], torch.cuda.get_device_capability(device)
    if found < needed:
        instead = "bf16" if found >= CAPABILITY["bf16"] else "fp16"
        raise ValueError(
            f"{precision} needs a GPU of compute capability {needed[0]}.{needed[1]} or later; this one, "
            f'{torch.cuda.get_device_name(device)}, has {found[0]}.{found[1]}. Take "{instead}".'
        )


@torch.no_grad()
def pack(model: nn.Module, precision: CudaPrecision, device: torch.device) -> "CudaNet":
    """A twin of a model on a device: pixels (B, 3, H, W) of any float type → float32 logits.

    Args:
        model: plain, a ViT or an ImagePerceiver, fp32, on any device. It is not changed; in fp32 its weights are shared
            where it lies on `device` already, and must not change afterwards.
    Raises:
        ValueError: another kind of model, an unknown precision, or one that the GPU does not multiply.
    """
    check(precision, device)
    if not isinstance(model, ViT | ImagePerceiver):
        raise ValueError(f"{type(model).__name__} has no fast form on a GPU; ViT and ImagePerceiver have.")
    if precision == "fp32":
        memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.device == device}
        return CudaNet(copy.deepcopy(model, memo).to(device).eval(), torch.float32, device)
    twin: Any = copy.deepcopy(model).to(device).eval()
    dtype = DTYPES[precision]
    layers, num_read = twin.layers if isinstance(model, ViT) else twin.encoder.layers, None
    if isinstance(model, ViT) and model.config.pool == "token":
        num_read = model.config.num_positioned
    for i, layer in enumerate(layers):
        last = i == len(layers) - 1
        layers[i] = _Layer(layer, dtype, fp8=precision == "fp8", num_read=num_read if last else None, leave=last)
    if isinstance(model, ViT):
        twin.patch_embed = _PatchEmbed(twin.patch_embed, dtype)
        for name in ("stem", "attn_pool"):
            if (part := getattr(twin, name)) is not None:
                setattr(twin, name, _Low(part, dtype))
    else:
        stages: Any = [part for part in twin.front_end.modules() if isinstance(part, ConvStage)]
        for stage in stages:
            stage.conv, stage.norm = fuse_conv_bn_eval(stage.conv, stage.norm), nn.Identity()
        twin.front_end = _Low(twin.front_end.to(memory_format=torch.channels_last), dtype)
        twin.encoder.cross = _Read(twin.encoder.cross, twin.encoder.latents, dtype)
    return CudaNet(twin.requires_grad_(False), dtype, device)


# ── running ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class CudaNet:
    """pixels (B, 3, H, W) of any float type, on any device → logits (B, K) in float32, on the twin's.

    A batch is padded to the next of few sizes, for each of which, and for each image size, a CUDA graph is captured
    when it is first met. Threads take turns.

    Args:
        twin: of `pack`.
        dtype: that the twin takes pixels in; in float32 it is run as it is.
    """

    def __init__(self, twin: Any, dtype: torch.dtype, device: torch.device) -> None:
        self.twin, self.dtype, self.device = twin, dtype, device
        self.functions: dict[str, Callable[[Tensor], Tensor]] = {"logits": twin.forward, "features": twin.features}
        self.slots: dict[tuple[str, torch.Size], tuple[Tensor, Callable[[], Tensor]]] = {}  # inputs, and what runs them
        self._lock, self._stream = threading.Lock(), None
        if device.type == "cuda" and dtype != torch.float32:
            self._stream = torch.cuda.Stream(device)  # of its own: graphs share memory, so that two must never overlap
            self._pool = torch.cuda.graph_pool_handle()
            # without the CUDA graphs of torch.compile itself, which are bound to one thread
            self.compiled = {name: torch.compile(run, fullgraph=True) for name, run in self.functions.items()}

    def __call__(self, pixels: Tensor) -> Tensor:
        return self._run("logits", pixels)

    def features(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, D), float32."""
        return self._run("features", pixels)

    @torch.inference_mode()
    def _run(self, name: str, pixels: Tensor) -> Tensor:
        if self.dtype == torch.float32:
            return self.functions[name](pixels.to(self.device, self.dtype))
        with self._lock:
            if self._stream is None:
                return self._run_parts(name, pixels)
            current = torch.cuda.current_stream(self.device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                outputs = self._run_parts(name, pixels)
            current.wait_stream(self._stream)
            outputs.record_stream(current)
            return outputs

    def _run_parts(self, name: str, pixels: Tensor) -> Tensor:
        """What an earlier batch left in the rows that pad this one is computed with it and thrown away."""
        outputs = []
        for part in pixels.split(MAX_BATCH):
            shape = torch.Size((bucket(len(part)), *part.shape[1:]))
            if (name, shape) not in self.slots:
                place = torch.zeros(shape, dtype=self.dtype, device=self.device)
                run = partial(self.functions[name], place) if self._stream is None else self._capture(name, place)
                self.slots[name, shape] = place, run
            place, run = self.slots[name, shape]
            place[: len(part)].copy_(part, non_blocking=True)
            outputs.append(run()[: len(part)].clone())
        return torch.cat(outputs)

    def _capture(self, name: str, pixels: Tensor) -> Callable[[], Tensor]:
        """A CUDA graph of a function on these pixels, whatever they then hold."""
        torch._dynamo.mark_dynamic(pixels, 0)  # compiled once for all sizes of a batch
        with _capturing:
            function = self._compiled(name, pixels)
            for _ in range(2):
                function(pixels)
            graph = torch.cuda.CUDAGraph()
            # "thread_local": meanwhile other threads may use the GPU
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                outputs = function(pixels)

        def run() -> Tensor:
            graph.replay()
            return outputs

        return run

    def _compiled(self, name: str, pixels: Tensor) -> Callable[[Tensor], Tensor]:
        """The function compiled; where that fails, for want of triton or a C compiler, the function."""
        try:
            with torch._dynamo.config.patch(recompile_limit=256):  # 8: a ninth model would not be compiled
                self.compiled[name](pixels)
        except Exception as error:  # of many kinds
            self.functions[name](pixels)  # raises what is wrong with the pixels, or with the GPU
            self.compiled = self.functions
            lines = str(error).splitlines()
            reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
            log.warning("the model runs uncompiled, which is slower. %s", reason)
        return self.compiled[name]


def bucket(count: int) -> int:
    """The size that `count` images are padded to: 2, 3, 4, 6, 8, 12, 16, …, powers of two and halfway between.

    Not 1: a batch of one is compiled on its own, for another speed and slightly other rounding.
    """
    power = 2
    while power < count:
        power *= 2
    return power // 4 * 3 if power > 2 and power // 4 * 3 >= count else power


# ── the twin's parts ─────────────────────────────────────────────────────────────────────────────────────────────────


class _Dense(nn.Module):
    """A dense layer in another type: (…, in) → (…, out)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias = nn.Buffer(weight.to(dtype)), None if bias is None else nn.Buffer(bias.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _Fp8Dense(nn.Module):
    """A dense layer on e4m3: (…, in) → (…, out) in bf16.

    Each row of the input has a scale of its own, found as it comes: it never depends on its neighbours in the batch.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        codes, scale = _to_fp8(weight)
        self.weight, self.scale = nn.Buffer(codes), nn.Buffer(scale.T.contiguous())  # out in, 1 out
        self.bias = None if bias is None else nn.Buffer(bias.bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = _to_fp8(x.flatten(0, -2))
        y = torch._scaled_mm(
            codes, self.weight.t(), scale, self.scale, bias=self.bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return y.unflatten(0, x.shape[:-1])


def _to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C) → codes (N, C) in e4m3 and scales (N, 1) in float32: a number is its code times its row's scale."""
    x = x.float()
    scale = x.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / E4M3_MAX
    return (x / scale).to(torch.float8_e4m3fn), scale


def _dense(
    layers: Sequence[nn.Linear], dtype: torch.dtype, *, fp8: bool, scale: Tensor | None = None
) -> _Dense | _Fp8Dense:
    """Dense layers of one input, as one, times a layer scale (out,). Widths that 16 does not divide stay in bf16."""
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    if scale is not None:
        weight, bias = weight * scale[:, None], None if bias is None else bias * scale
    if fp8 and not any(side % 16 for side in weight.shape):
        return _Fp8Dense(weight, bias)
    return _Dense(weight, bias, dtype)


class _Layer(nn.Module):
    """A `TransformerLayer`: (B, N, D) → (B, N, D), or the first `num_read` tokens of it.

    Args:
        leave: give float32: for what comes behind the last one.
    """

    def __init__(
        self, layer: TransformerLayer, dtype: torch.dtype, *, fp8: bool, num_read: int | None, leave: bool
    ) -> None:
        super().__init__()
        attn, mlp = layer.attn, layer.mlp
        self.dtype, self.out_dtype, self.num_read = dtype, torch.float32 if leave else dtype, num_read
        self.num_heads, self.gated, self.activation = attn.num_heads, mlp.gated, ACTIVATIONS[mlp.activation]
        self.widths = [attn.q.out_features, attn.k.out_features, attn.v.out_features]
        if num_read is None:
            self.qkv = _dense([attn.q, attn.k, attn.v], dtype, fp8=fp8)
        else:
            self.q, self.kv = _dense([attn.q], dtype, fp8=fp8), _dense([attn.k, attn.v], dtype, fp8=fp8)
        self.out = _dense([attn.out], dtype, fp8=fp8, scale=layer.attn_scale)
        self.fc1 = _dense([mlp.fc1], dtype, fp8=fp8)
        self.fc2 = _dense([mlp.fc2], dtype, fp8=fp8, scale=layer.mlp_scale)
        self.norm1, self.norm2 = layer.norm1.to(dtype), layer.norm2.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        y = self.norm1(x)
        if self.num_read is None:
            parts = self.qkv(y).split(self.widths, dim=-1)
        else:
            x = x[:, : self.num_read]
            parts = self.q(y[:, : self.num_read]), *self.kv(y).split(self.widths[1:], dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)  # B h N d
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.fc1(self.norm2(x))
        if self.gated:
            gate, y = y.chunk(2, dim=-1)
            y = F.silu(gate) * y
        else:
            y = self.activation(y)
        return (x + self.fc2(y)).to(self.out_dtype)


class _Read(nn.Module):
    """A `CrossAttentionLayer` whose queries are the same for every image: tokens (B, N, C) → (B, M, D).

    q·(W t + b) is (Wᵀ q)·t and a number that the softmax does not see; weights that sum to one leave W_out (W t + b)
    as (W_out W) (Σ w t) and a constant. So neither queries, keys nor values are computed. C is filled up to a multiple
    of 8 with zeros, without which products of bf16 are slow: 322 is the published one.
    """

    def __init__(self, layer: CrossAttentionLayer, queries: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        attn, mlp, heads = layer.attn, layer.mlp, layer.attn.num_heads
        width = attn.k.in_features
        self.dtype, self.pad, self.num_heads = dtype, -width % 8, heads
        q = attn.q(layer.norm_q(queries)).unflatten(1, (heads, -1)).transpose(0, 1)  # h M d
        query = q @ attn.k.weight.unflatten(0, (heads, -1)) * q.shape[-1] ** -0.5  # h M C
        self.query = nn.Buffer(F.pad(query, (0, self.pad)).flatten(0, 1).to(dtype))  # h·M C
        values = attn.v.weight.unflatten(0, (heads, -1))  # h d C
        weight = torch.einsum("ohd,hdc->ohc", attn.out.weight.unflatten(1, (heads, -1)), values)
        bias = attn.out.bias if attn.v.bias is None else attn.out(attn.v.bias)
        self.out = _Dense(F.pad(weight, (0, self.pad)).flatten(1), bias, dtype)
        self.residual = nn.Buffer(queries.to(dtype)) if layer.query_residual else None
        self.norm_kv, self.norm_mlp = layer.norm_kv.to(dtype), layer.norm_mlp.to(dtype)
        self.fc1, self.fc2 = _dense([mlp.fc1], dtype, fp8=False), _dense([mlp.fc2], dtype, fp8=False)
        self.activation = ACTIVATIONS[mlp.activation]

    def forward(self, latents: Tensor, tokens: Tensor, mask: None = None) -> Tensor:
        tokens = F.pad(self.norm_kv(tokens.to(self.dtype)), (0, self.pad))
        x = torch.softmax(self.query @ tokens.transpose(1, 2), dim=-1) @ tokens  # B h·M C
        x = self.out(x.unflatten(1, (self.num_heads, -1)).transpose(1, 2).flatten(2))
        x = x if self.residual is None else self.residual + x
        return x + self.fc2(self.activation(self.fc1(self.norm_mlp(x))))


class _PatchEmbed(nn.Module):
    """A convolution whose kernel is its stride, as a product: (B, C, H, W) → (B, D, H', W')."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        self.patch_size = conv.kernel_size
        self.dense = _Dense(conv.weight.flatten(1), conv.bias, dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        height, width = self.patch_size
        patches = pixels.to(self.dense.weight.dtype).unflatten(3, (-1, width)).unflatten(2, (-1, height))
        return self.dense(patches.permute(0, 2, 4, 1, 3, 5).flatten(3)).permute(0, 3, 1, 2)  # of B H' W' C·h·w


class _Low(nn.Module):
    """A part of the model in another type, float32 outside of it."""

    def __init__(self, part: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.part, self.dtype = part.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x.to(self.dtype)).float()


# ── pixels ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Uploader:
    """Resized images → normalised pixels (B, 3, H, W) on a device, equal to `normalise_batch`'s to the bit in float32.

    Bytes are what crosses the bus. They pass through two pinned buffers in turn: one is filled while the other may
    still be read, on a stream beside the one that computes. Threads take turns.
    """

    def __init__(self, preprocess: PreprocessConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.preprocess, self.device, self.dtype = preprocess, device, dtype
        every = np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(3, axis=2)
        self.table = preprocess.normalise(every)[:, 0].to(device, dtype)  # 3 256
        self._lock, self._turn = threading.Lock(), 0
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._read = [torch.cuda.Event(), torch.cuda.Event()] if self._stream is not None else []

    @torch.inference_mode()
    def __call__(self, resized: Sequence[np.ndarray]) -> Tensor:
        """
        Args:
            resized: images as `PreprocessConfig.resize` gives them: (H, W, 3), uint8, or of some methods float32, which
                are normalised before they are sent.
        """
        if len(resized) == 0 or resized[0].dtype != np.uint8:
            return self.preprocess.normalise_batch(resized).to(self.device, self.dtype)
        with self._lock:
            images = self._send(resized)
        planes = zip(self.table, images.unbind(3), strict=True)
        return torch.stack([table[plane.int()] for table, plane in planes], dim=1)

    def _send(self, resized: Sequence[np.ndarray]) -> Tensor:
        """(B, H, W, 3) uint8 on the device."""
        self._turn = turn = 1 - self._turn
        if self._stream is not None:
            self._read[turn].synchronize()
        shape = (len(resized), *resized[0].shape)
        if self._buffers[turn].numel() < (count := int(np.prod(shape))):
            self._buffers[turn] = torch.empty(count, dtype=torch.uint8, pin_memory=self._stream is not None)
        filled = self._buffers[turn][:count].view(shape)
        np.stack(resized, out=filled.numpy())
        if self._stream is None:
            return filled
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            images = filled.to(self.device, non_blocking=True)
            self._read[turn].record(self._stream)
        current.wait_event(self._read[turn])
        images.record_stream(current)
        return images
