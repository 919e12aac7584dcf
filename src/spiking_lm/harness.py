"""Any of our language models under the tasks of lm-eval (extra ``eval``)::

    import lm_eval
    from spiking_lm.harness import HarnessLM

    lm_eval.simple_evaluate(model=HarnessLM(model, tokenizer), tasks=["piqa", "arc_easy"])

Importing this module without lm-eval raises MissingExtraError.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from spiking_lm.choices import Row, encode_row, score_rows
from spiking_lm.errors import MissingExtraError
from spiking_lm.evaluation import score_tokens
from spiking_lm.generation import sample_text
from spiking_lm.stages import EvaluateConfig, GenerateConfig

try:
    from lm_eval.api.model import LM
except ImportError as error:
    raise MissingExtraError("running lm-eval's tasks", "eval", detail=str(error)) from None

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from spiking_lm.data import Tokenizer
    from spiking_lm.interfaces import SpikingLanguageModel


class HarnessLM(LM):  # type: ignore[misc]  # it is Any where lm-eval is not installed
    """A model and its tokenizer as lm-eval's ``LM``.

    ``max_length`` None reads every text whole, the state carried; a number cuts prompts on the left and scores running
    text in windows of so many tokens, as lm-eval does with models of limited context. Empty prompts are the
    tokenizer's end of text, or a line end where it has none.
    """

    def __init__(
        self,
        model: SpikingLanguageModel,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 16,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length
        eos_id = tokenizer.eos_id
        self._prefix = np.array([eos_id] if eos_id is not None else tokenizer.encode("\n")[:1], np.int64)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return for each (context, continuation) its log-likelihood in nats, and whether greedy decoding gives it."""
        pairs = [request.args for request in requests]
        groups = [
            [self._row(context, continuation) for _, continuation in same]
            for context, same in itertools.groupby(pairs, key=lambda pair: pair[0])
        ]
        scores = score_rows(self.model, groups, batch_size=self.batch_size)
        return [(score.log_likelihood, score.greedy) for score in itertools.chain.from_iterable(scores)]

    def _row(self, context: str, continuation: str) -> Row:
        if context:
            row = encode_row(self.tokenizer, context, continuation)
        else:
            row = Row(self._prefix, self.tokenizer.encode(continuation).astype(np.int64))
        if self.max_length is None:
            return row
        return Row(row.context[-max(1, self.max_length + 1 - len(row.continuation)) :], row.continuation)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the log-likelihood in nats of each whole text."""
        if self.max_length is None:
            config = EvaluateConfig(protocol="carried")
        else:
            config = EvaluateConfig(window=self.max_length, stride=self.max_length, batch_size=self.batch_size)
        return [self._rolling(request.args[0], config) for request in requests]

    def _rolling(self, text: str, config: EvaluateConfig) -> float:
        tokens = np.concatenate([self._prefix, self.tokenizer.encode(text).astype(np.int64)])
        return -float(score_tokens(self.model, tokens, config)[0].sum()) if len(tokens) > 1 else 0.0

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return for each (context, options) what the model writes, up to the first of the stop texts ``until``."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stop = [until] if isinstance(until, str) else list(until)
        if self.tokenizer.eos_id is not None:
            stop.append(self.tokenizer.decode([self.tokenizer.eos_id]))
        most = int(options.get("max_gen_toks", 256))
        prompt = self.tokenizer.encode(context) if context else self._prefix
        if self.max_length is not None:
            prompt = prompt[-max(1, self.max_length - most) :]
        config = GenerateConfig(
            prompt=self.tokenizer.decode(prompt),
            max_new_tokens=most,
            temperature=float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0,
            top_k=options.get("top_k"),
            top_p=options.get("top_p") or 1.0,
            stop=stop,
        )
        return sample_text(self.model, self.tokenizer, config).text

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval tells its caches of requests apart by."""
        return f"spiking-lm-{self.tokenizer.sha256[:16]}"
