"""Modules of plain torch, as torchvision, torchaudio and users write them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.architecture import Architecture


def feed_forward(activation: nn.Module) -> nn.Module:
    """Up, an activation, down."""
    return nn.Sequential(nn.Linear(64, 128), activation, nn.Linear(128, 64))


class Mlp(nn.Module):
    """Residual blocks without any norm."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(48, 64)
        self.blocks = nn.ModuleList(feed_forward(nn.Tanh()) for _ in range(2))
        self.end = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for block in self.blocks:
            x = x + block(x)
        return self.end(x)


class Block(nn.Module):
    """Two convolutions with batch norm, ReLU in place, a strided shortcut."""

    def __init__(self, n: int, m: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(n, m, 3, stride, 1, bias=False), nn.BatchNorm2d(m)
        self.conv2, self.norm2 = nn.Conv2d(m, m, 3, 1, 1, bias=False), nn.BatchNorm2d(m)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(n, m, 1, stride, bias=False), nn.BatchNorm2d(m)) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y += x if self.down is None else self.down(x)
        return self.relu(y)


class ResNet(nn.Module):
    """A ResNet in small, with a linear at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.layers = nn.Sequential(Block(16, 16, 1), Block(16, 64, 2))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(self.layers(self.stem(x)), 1), 1))


class InvertedResidual(nn.Module):
    """MobileNet's block with squeeze and excitation by linears, in place where it can be."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.expand = nn.Sequential(nn.Conv2d(16, 64, 1), nn.BatchNorm2d(64), nn.Hardswish(inplace=True))
        self.depth = nn.Sequential(nn.Conv2d(64, 64, 3, 1, 1, groups=64), nn.BatchNorm2d(64), nn.ReLU6(inplace=True))
        self.squeeze, self.excite = nn.Linear(64, 16), nn.Linear(16, 64)
        self.project = nn.Conv2d(64, 16, 1)
        self.head = nn.Sequential(nn.Linear(16, 64), nn.Hardswish(inplace=True), nn.Dropout(0.2), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depth(self.expand(x))
        gate = self.excite(nn.functional.relu(self.squeeze(y.mean((2, 3))), inplace=True)).sigmoid()
        return self.head((x + self.project(y * gate[:, :, None, None])).mean((2, 3)))


class UNet(nn.Module):
    """Down, a middle of linears conditioned on a time, up with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 32))
        self.down1, self.down2 = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 32, 3, 2, 1)
        self.norm = nn.GroupNorm(4, 32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.end = nn.Conv2d(32, 3, 3, 1, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        first = nn.functional.silu(self.down1(x))
        x = nn.functional.silu(self.down2(first)) + self.time(time)[:, :, None, None]
        rows = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(rows).chunk(3, -1)
        mixed = self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        x = x + mixed.transpose(1, 2).reshape(x.shape)
        return self.end(torch.cat([self.up(x), first], 1))


class Mixer(nn.Module):
    """MLP-Mixer: linears over tokens and over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 64, 8, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(5))
        self.tokens = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))
        self.channels = nn.ModuleList(feed_forward(nn.GELU()) for _ in range(2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for i, (tokens, channels) in enumerate(zip(self.tokens, self.channels, strict=True)):
            x = x + tokens(self.norms[2 * i](x).transpose(1, 2)).transpose(1, 2)
            x = x + channels(self.norms[2 * i + 1](x))
        return self.head(self.norms[4](x).mean(1))


class Attention(nn.Module):
    """Blocks that call nn.MultiheadAttention, norms in front."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(2))
        self.attentions = nn.ModuleList(nn.MultiheadAttention(64, 4, **options) for _ in range(2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            y = norm(x)
            x = x + attention(y, y, y, need_weights=False)[0]
        return self.head(x)


class Recurrent(nn.Module):
    """An embedding, an LSTM, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.head = (
            nn.Embedding(128, 64),
            nn.LSTM(64, 64, 2, batch_first=True),
            nn.Linear(64, 128),
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(input_ids))[0])


class Audio(nn.Module):
    """Strided convolutions over a wave, then linears over channels behind a transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(nn.Conv1d(1, 32, 8, 4), nn.GELU(), nn.Conv1d(32, 64, 4, 4), nn.GELU())
        self.norm, self.up, self.gate, self.down = (
            nn.LayerNorm(64),
            nn.Linear(64, 128),
            nn.Linear(64, 128),
            nn.Linear(128, 64),
        )
        self.head = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs(x[:, None]).transpose(1, 2).contiguous()
        y = self.norm(x)
        return self.head(x + self.down(self.up(y) * torch.sigmoid(self.gate(y)))).log_softmax(-1)


class TwoHeads(nn.Module):
    """A trunk in place, and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(48, 64), nn.LayerNorm(64), nn.ReLU(inplace=True), nn.Linear(64, 64), nn.RMSNorm(64)
        )
        self.actor, self.critic = nn.Linear(64, 6), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.trunk(x)
        return {"logits": self.actor(x), "value": self.critic(x)}


class Causal(nn.Module):
    """Words through an encoder with norms in front, a mask and no last norm."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(norm_first=True, batch_first=True, **LAYER)
        self.embedding, self.head = nn.Embedding(128, 64), nn.Linear(64, 128)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        return self.head(self.encoder(self.embedding(input_ids), mask))


def vector():
    return {"x": torch.randn(6, 48)}


def picture():
    return {"x": torch.randn(2, 3, 32, 32)}


def sequence(name: str):
    return lambda: {name: torch.randn(2, 8, 64)}


LAYER = dict(d_model=64, nhead=4, dim_feedforward=128)

PLAIN_TORCH = {
    "torch_audio": Architecture(Audio, lambda: {"x": torch.randn(2, 400)}, dynamic=False),
    "torch_encoder": Architecture(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(batch_first=True, **LAYER), 2), sequence("src")
    ),
    "torch_encoder_causal": Architecture(Causal, lambda: {"input_ids": torch.randint(0, 128, (2, 8))}),
    "torch_encoder_pre_norm": Architecture(
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(norm_first=True, activation="gelu", **LAYER), 2, nn.LayerNorm(64), False
        ),
        sequence("src"),
    ),
    "torch_inverted_residual": Architecture(InvertedResidual, picture, dynamic=False),
    "torch_lstm": Architecture(Recurrent, lambda: {"input_ids": torch.randint(0, 128, (2, 8))}),
    "torch_mixer": Architecture(Mixer, picture, dynamic=False),
    "torch_multihead_attention": Architecture(lambda: Attention(batch_first=True), sequence("x")),
    "torch_multihead_attention_bias_kv": Architecture(
        lambda: Attention(add_bias_kv=True, bias=False), sequence("x"), dynamic=False
    ),
    "torch_residual_mlp": Architecture(Mlp, vector),
    "torch_resnet": Architecture(ResNet, picture, dynamic=False),
    "torch_transformer": Architecture(
        lambda: nn.Transformer(64, 4, 2, 2, 128, batch_first=True),
        lambda: {"src": torch.randn(2, 8, 64), "tgt": torch.randn(2, 5, 64)},
    ),
    "torch_two_heads": Architecture(TwoHeads, vector),
    "torch_unet": Architecture(UNet, lambda: {**picture(), "time": torch.randn(2, 16)}, dynamic=False),
}
