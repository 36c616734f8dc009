"""Decoders of the estimator: encoded rows to compressed scores Y ``[N, H, T, K]`` (SEA, section 3.1)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_DILATION = 2


class CausalDecoder(nn.Module):
    """Two dilated convolutions that look back only, on an image of width K / 4 with two channels per head.

    ``subpixel`` lets the last 1 x 1 convolution emit four scores per column; otherwise (the paper's nearest
    upsampling, with which a 1 x 1 convolution commutes) one score is repeated four times.

    Images are kept channels-last, in the dtype that autocast gives to products.

    Args:
        pooled: whether normalised pooled scores enter as four more channels per head.
    """

    look_back = 4 * _DILATION  # rows before its own that a row's scores depend on

    def __init__(self, num_heads: int, head_dim: int, num_bins: int, *, subpixel: bool, pooled: bool) -> None:
        super().__init__()
        self.num_heads, self.width = num_heads, num_bins // 4
        self.subpixel = subpixel
        channels = 2 * num_heads
        self.rows = nn.Linear(2 * head_dim, 2 * self.width)
        self.norm = nn.LayerNorm(self.width)
        self.first = nn.Conv2d(channels + 4 * num_heads * pooled, channels, 3, dilation=_DILATION)
        self.second = nn.Conv2d(channels, channels, 3, dilation=_DILATION)
        self.mix = nn.Conv2d(channels, num_heads * (4 if subpixel else 1), 1)
        self.out_norm = nn.LayerNorm(num_bins)
        if pooled:  # start as a correction of zero: an untrained decoder must not disturb the pooled scores
            nn.init.zeros_(self.out_norm.weight)

    def forward(
        self, encoded: Tensor, pooled: Tensor | None, real_rows: Tensor, start: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        """Scores ``[N, H, T, K]``, or ``[N, H, R, K]`` of ``rows`` alone.

        Args:
            encoded: ``[N, H, T, 2D]``.
            pooled: ``[N, H, T, K]``, normalised over K, or None.
            real_rows: bool ``[N, T]``.
            start: unused here: causal convolutions do not care where an item starts.
            rows: int64 ``[N, R]``, rows to score; None for all. Worth its gathers if R is a fourth of T or less.
        """
        image = self._image(encoded, pooled, real_rows)
        image = self._convolve(image, real_rows) if rows is None else self._convolve_rows(image, real_rows, rows)
        scores = self.mix(image)
        scores = _from_channels(scores, 4) if self.subpixel else scores.repeat_interleave(4, dim=-1)
        return self.out_norm(scores)

    def _image(self, encoded: Tensor, pooled: Tensor | None, real_rows: Tensor) -> Tensor:
        """Channels of the first convolution, zero in padding rows: ``[N, 2H or 6H, T, W]``."""
        rows = self.rows(encoded).unflatten(-1, (2, self.width))  # [N, H, T, 2, W]
        image = self.norm(rows).transpose(2, 3).flatten(1, 2)
        if pooled is not None:
            image = torch.cat([image, _to_channels(pooled, 4).to(image.dtype)], dim=1)
        return _channels_last(image, rows.dtype) * real_rows[:, None, :, None]

    def _convolve(self, image: Tensor, real_rows: Tensor) -> Tensor:
        image = F.relu(self.first(_look_back(image)))
        return F.relu(self.second(_look_back(image * real_rows[:, None, :, None])))

    def _convolve_rows(self, image: Tensor, real_rows: Tensor, rows: Tensor) -> Tensor:
        """As ``_convolve`` for the rows ``rows [N, R]``, each from the five rows that it depends on."""
        taps = rows[..., None] - _DILATION * torch.arange(4, -1, -1, device=rows.device)  # [N, R, 5]
        index = taps.clamp_min(0).flatten(1)
        real = (real_rows.gather(1, index) & (taps >= 0).flatten(1)).view(-1, 1, 5, 1)
        image = image.gather(2, index[:, None, :, None].expand(-1, image.shape[1], -1, image.shape[3]))
        image = image.unflatten(2, (-1, 5)).transpose(1, 2).flatten(0, 1)  # [N * R, channels, 5, W]
        image = _channels_last(image, image.dtype)
        wide = {"padding": (0, _DILATION), "dilation": (1, _DILATION)}
        image = F.relu(F.conv2d(image * real, self.first.weight, self.first.bias, **wide))
        image = F.relu(F.conv2d(image * real[:, :, 2:], self.second.weight, self.second.bias, **wide))
        return image.squeeze(2).unflatten(0, rows.shape).transpose(1, 2)


class BidirectionalDecoder(nn.Module):
    """Three convolutions at width K / 2, the first two at half the rows, then resized to K columns.

    Args:
        pooled: whether normalised pooled scores enter as two more channels per head.
    """

    def __init__(self, num_heads: int, head_dim: int, num_bins: int, *, pooled: bool) -> None:
        super().__init__()
        self.num_heads, self.width = num_heads, num_bins // 2
        channels = 4 * num_heads
        self.rows = nn.Linear(2 * head_dim, 4 * self.width)
        self.first = nn.Conv2d(channels + 2 * num_heads * pooled, channels, 3, stride=(2, 1), padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        # no bias: it would add the same to all bins of a head, which their softmax does not see
        self.last = nn.Conv2d(channels, num_heads, 3, padding=1, bias=False)
        if pooled:  # as in the causal decoder
            nn.init.zeros_(self.last.weight)

    def forward(self, encoded: Tensor, pooled: Tensor | None, real_rows: Tensor, start: Tensor) -> Tensor:
        """Scores; arguments as for ``CausalDecoder``, with ``start [N]`` the items' first real row."""
        image = self.rows(encoded).unflatten(-1, (4, self.width)).transpose(2, 3).flatten(1, 2)  # [N, 4H, T, W]
        if pooled is not None:
            image = torch.cat([image, _to_channels(pooled, 2).to(image.dtype)], dim=1)
        # rows are halved in pairs counted from the item's first real row, so that left padding changes nothing
        return _left_aligned(self._convolve, image, real_rows, start)

    def _convolve(self, image: Tensor, real_rows: Tensor) -> Tensor:
        real = real_rows[:, None, :, None].to(image.dtype)
        half = F.max_pool2d(real, (2, 1), ceil_mode=True)
        image = F.relu(self.first(_channels_last(image, image.dtype) * real))
        image = F.relu(self.second(image * half))
        image = (image * half).repeat_interleave(2, dim=2)[:, :, : real.shape[2]]
        return twice_as_wide(self.last(image * real))


def _channels_last(image: Tensor, dtype: torch.dtype) -> Tensor:
    return image.to(dtype, memory_format=torch.channels_last)


def _look_back(image: Tensor) -> Tensor:
    """Pad so that a 3 x 3 dilated convolution keeps the size and sees no later row."""
    return F.pad(image, (_DILATION, _DILATION, 2 * _DILATION, 0))


def _to_channels(scores: Tensor, factor: int) -> Tensor:
    """``[N, H, T, K]`` to ``[N, factor * H, T, K / factor]``: neighbouring bins become channels."""
    return scores.unflatten(-1, (-1, factor)).permute(0, 1, 4, 2, 3).flatten(1, 2)


def _from_channels(image: Tensor, factor: int) -> Tensor:
    """Inverse of ``_to_channels``."""
    return image.unflatten(1, (-1, factor)).permute(0, 1, 3, 4, 2).flatten(-2)


def twice_as_wide(scores: Tensor) -> Tensor:
    """``[..., W]`` to ``[..., 2W]`` by linear interpolation between the columns' centres.

    ``F.interpolate`` gives the same, but on a GPU each of its threads takes one column of all rows, one after another,
    and PyTorch counts its gradient among those that change from run to run.
    """
    left = torch.cat([scores[..., :1], scores[..., :-1]], -1)
    right = torch.cat([scores[..., 1:], scores[..., -1:]], -1)
    return torch.stack([torch.lerp(scores, left, 0.25), torch.lerp(scores, right, 0.25)], -1).flatten(-2)


def _left_aligned(function: Callable, image: Tensor, real_rows: Tensor, start: Tensor) -> Tensor:
    """``function`` of image ``[N, C, T, W]`` and rows ``[N, T]`` with every item moved to begin at row 0, and back."""
    num_rows = image.shape[2]
    row = torch.arange(num_rows, device=image.device)
    there, back = (row + start[:, None]) % num_rows, (row - start[:, None]) % num_rows
    moved = image.gather(2, there[:, None, :, None].expand_as(image))
    result = function(moved, real_rows.gather(1, there))
    return result.gather(2, back[:, None, :, None].expand_as(result))
