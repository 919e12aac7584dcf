"""The gesture classifier of EGRU (Subramoney et al., arXiv 2206.06178, section on DVS128 Gesture)::

    frames -> CNN, frame by frame -> dropout -> EGRU -> trace -> dropout -> readout

The CNN sees one frame and the readout one trace at a time: EGRU alone remembers. Its trace is a running mean of the
events, so the readout follows what fired lately. A clip's class is the mean of the scores after its frames.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spiking_lm.errors import ConfigError, UsageError
from spiking_lm.interfaces import LMOutput, SpikeSite, SpikingClipClassifier, State, mean_over_steps
from spiking_lm_egru.functional import EGRUState
from spiking_lm_egru.gesture_config import EGRUGestureConfig
from spiking_lm_egru.module import EGRU

SITE = "egru"


class EGRUGesture(SpikingClipClassifier):
    """A CNN and a layer of event-based units that classify clips of event frames."""

    config: EGRUGestureConfig

    def __init__(self, config: EGRUGestureConfig) -> None:
        super().__init__()
        self.config = config
        self.cnn = _cnn(config)
        self.egru = EGRU(
            config.n_features,
            config.n_hidden,
            dropout=config.dropout_connect,
            zoneout=config.zoneout,
            dampening_factor=config.dampening_factor,
            pseudo_derivative_support=config.pseudo_derivative_support,
            thr_mean=config.thr_mean,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.readout = nn.Linear(config.n_hidden, config.num_classes)

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> EGRUState:
        """Return the state before the first frame, zeros ``(B, n_hidden)``."""
        return self.egru.init_state(batch_size, device=device, dtype=dtype)

    def forward(
        self, frames: Tensor, state: State | None = None, *, lengths: Tensor | None = None, return_spikes: bool = False
    ) -> LMOutput:
        """Score frames ``(B, T, P, H, W)``: logits ``(B, T, num_classes)``, the next state and, on request, the events.

        In training, ``aux_losses`` holds the activity penalties. Raises UsageError for input of another shape.
        """
        if frames.ndim != 5 or frames.shape[1] == 0 or frames.shape[2:] != self.config.frame_shape:
            shape = ", ".join(map(str, self.config.frame_shape))
            raise UsageError(
                f"{type(self).__name__} reads frames of events (B, T, {shape}), not {tuple(frames.shape)}",
                hint="the frames of a clip come from a dataset of clips, e.g. gestures11",
            )
        batch, steps = frames.shape[:2]
        features = self.cnn(frames.flatten(0, 1)).unflatten(0, (batch, steps))
        y, run = self.egru(self.dropout(features), state, return_sequences=True)
        logits = self.readout(self.dropout(run.trace).to(self.readout.weight.dtype))
        after = EGRUState(*(value[:, -1] for value in run))
        aux = self._penalties(run, lengths) if self.training else {}
        return LMOutput(logits, after, {SITE: y} if return_spikes else None, aux_losses=aux)

    def _penalties(self, run: EGRUState, lengths: Tensor | None) -> dict[str, Tensor]:
        """Return the losses on the events and on the states, over the true frames."""
        config, (batch, steps) = self.config, run.o.shape[:2]
        if lengths is None:
            lengths = torch.full((batch,), steps, device=run.o.device)

        def mean(x: Tensor) -> Tensor:
            return (mean_over_steps(x, lengths).mean(1) * lengths).sum() / lengths.sum()

        aux = {}
        if config.activity_loss:
            aux["activity"] = config.activity_loss * (mean(run.o) - config.activity_target).square()
        if config.voltage_loss:
            threshold = self.egru.thr.detach().clamp(0, 1)  # it is the states that move, not the thresholds
            aux["voltage"] = config.voltage_loss * mean(run.c - (threshold - config.voltage_target))
        return aux

    def spike_sites(self) -> list[SpikeSite]:
        """List the one layer that emits events."""
        return [SpikeSite(SITE, "graded")]


def _cnn(config: EGRUGestureConfig) -> nn.Sequential:
    """Return the network that turns a frame ``(P, H, W)`` into ``n_features`` values.

    Raises: ConfigError when the frames are too small for it.
    """
    layers = (_small if config.cnn == "small" else _alexnet)(config.frame_shape)
    for layer in layers:
        if isinstance(layer, nn.Conv2d):  # events are few: what little arrives must not fade from layer to layer
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            n_out = nn.Sequential(*layers)(torch.zeros(1, *config.frame_shape)).numel()
    except RuntimeError:
        raise ConfigError(
            f"model 'egru-gesture': frames of shape {config.frame_shape} are too small for cnn: {config.cnn}",
            hint="use larger frames (data.size) or cnn: small",
        ) from None
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(n_out, config.n_features))


def _small(frame_shape: tuple[int, int, int]) -> list[nn.Module]:
    """Return layers whose product is an eighth of the frame in each direction, 32 channels."""
    return [
        nn.Conv2d(frame_shape[0], 8, kernel_size=5, stride=2, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.ReLU(),
    ]


def _alexnet(frame_shape: tuple[int, int, int]) -> list[nn.Module]:
    """Return the published layers; of frames of 128 x 128 they leave 1 x 1, smaller ones are pooled less often."""
    channels, *sides = frame_shape
    size = min(sides)
    layers: list[nn.Module] = [nn.Conv2d(channels, 64, kernel_size=11, stride=4, padding=2), nn.ReLU()]
    for n_in, n_out, kernel, pooled in (
        (64, 192, 5, True),
        (192, 384, 3, True),
        (384, 256, 3, size >= 64),
        (256, 256, 3, size >= 128),
    ):
        layers += [nn.MaxPool2d(3, stride=2)] if pooled else []
        layers += [nn.Conv2d(n_in, n_out, kernel_size=kernel, padding=kernel // 2), nn.ReLU()]
    return layers
