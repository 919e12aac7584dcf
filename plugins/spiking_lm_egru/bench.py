"""Timings of EGRU: a layer in training against other recurrent layers, and single steps of decoding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from spiking_lm.bench import Job, Row, interleaved
from spiking_lm.kernels.reference import egru_event
from spiking_lm_egru.module import EGRU, EGRUCell

BPTT = 70
"""Steps of a training sequence, as in the published language models."""


def egru_loop(x: Tensor, layer: EGRU) -> Tensor:
    """Compute a layer as it is usually written: step by step over ``x[t]``, with gradients by autograd."""
    c = y = x.new_zeros(x.shape[1], layer.hidden_size)
    outputs = []
    for t in range(x.shape[0]):
        a_z, a_r, a_g = (x[t] @ layer.kernel + layer.bias).chunk(3, -1)
        q_z, q_r, q_g = (y @ layer.recurrent_kernel + layer.recurrent_bias).chunk(3, -1)
        z, r = torch.sigmoid(a_z + q_z), torch.sigmoid(a_r + q_r)
        p = z * c + (1 - z) * torch.tanh(a_g + r * q_g)
        o = egru_event(p - layer.thr, layer.dampening_factor, layer.pseudo_derivative_support)
        y = o * p
        c = p - o * layer.thr
        outputs.append(y)
    return torch.stack(outputs)


def _train(batch: int, size: int, targets: dict[str, float], repeats: int, steps: int = BPTT) -> list[Row]:
    """Time forward and backward passes of one layer, all gradients included, against the same in other layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(steps, batch, size).requires_grad_()
        gradient = torch.randn(steps, batch, size)
        layer, gru, lstm = EGRU(size, size, batch_first=False), nn.GRU(size, size), nn.LSTM(size, size)

    def forward_backward(run: Callable[[Tensor], Tensor], module: nn.Module) -> Any:
        return torch.autograd.grad(run(x), [x, *module.parameters()], gradient)

    times = interleaved(
        {
            "egru": partial(forward_backward, lambda x: layer(x)[0], layer),
            "naive": partial(forward_backward, lambda x: egru_loop(x, layer), layer),
            "gru": partial(forward_backward, lambda x: gru(x)[0], gru),
            "lstm": partial(forward_backward, lambda x: lstm(x)[0], lstm),
        },
        repeats,
    )
    others = {"naive": "a loop over x[t] under autograd", "gru": "nn.GRU", "lstm": "nn.LSTM"}
    what = f"EGRU {size}-{size}, T {steps}, B {batch}: forward + backward"
    return _rows(f"egru/train-{batch}x{size}", what, times, others, targets)


def _decode(sparse_input: bool, target: float, repeats: int, size: int = 1350, activity: float = 0.2) -> list[Row]:
    """Time single steps of one stream, weights cold, against the cells of GRU and LSTM."""
    copies, steps = 3, 12  # three copies of the smallest cell (3 x 44 MB) are more than caches hold
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        x = torch.randn(1, size)
        if sparse_input:
            x *= torch.rand(1, size) < activity
        active = torch.rand(1, size) < activity
        h = torch.tanh(torch.randn(1, size))
        ours = [EGRUCell(size, size).eval() for _ in range(copies)]
        cells: dict[str, list[Any]] = {
            "egru": ours,
            "gru": [nn.GRUCell(size, size) for _ in range(copies)],
            "lstm": [nn.LSTMCell(size, size) for _ in range(copies)],
        }
    state = ours[0].init_state(1)._replace(c=h, y=h.abs() * active)
    states: dict[str, Any] = {"egru": state, "gru": h, "lstm": (h, h)}

    def walk(name: str) -> Job:
        turns = cycle(cells[name])

        def job() -> None:
            with torch.no_grad():
                for _ in range(steps):
                    next(turns)(x, states[name])

        return job

    times = interleaved({name: walk(name) for name in cells}, repeats)
    kind = "sparse" if sparse_input else "dense"
    what = f"EGRU {size}-{size}, one step of one stream, {activity:.0%} active, {kind} input, weights cold"
    return _rows(
        f"egru/decode-{kind}",
        what,
        times,
        {"gru": "nn.GRUCell", "lstm": "nn.LSTMCell"},
        {"gru": target, "lstm": target},
        scale=1e3 / steps,
        unit="us",
    )


def _rows(
    name: str,
    what: str,
    times: Any,
    others: dict[str, str],
    targets: dict[str, float],
    *,
    scale: float = 1.0,
    unit: str = "ms",
) -> list[Row]:
    """Return a row per ratio, all from one measurement."""
    found = {job: scale * ms for job, ms in times.ms().items()}
    return [
        Row(
            f"{name}/{other}",
            f"{what}, against {label}",
            found[other] / found["egru"],
            target=targets[other],
            note=f"{found[other]:.1f} {unit}; ours {found['egru']:.1f} {unit}",
            details=times.to_dict(),
        )
        for other, label in others.items()
    ]


train_1x256 = partial(_train, 1, 256, {"naive": 3.5, "gru": 1.5, "lstm": 0.9})
train_20x650 = partial(_train, 20, 650, {"naive": 1.25, "gru": 0.95, "lstm": 0.75})
decode_dense = partial(_decode, False, 1.6)
decode_sparse = partial(_decode, True, 2.5)
