"""The core's own plugin: neurons, kernels, datasets, tokenizers, metrics, recipes and checks that need no extra."""

from __future__ import annotations

from pathlib import Path

from spiking_lm.hookspecs import Register, hookimpl
from spiking_lm.records import (
    BenchmarkSpec,
    DatasetSpec,
    DoctorSpec,
    KernelSpec,
    MetricSpec,
    NeuronSpec,
    RecipeSpec,
    SpikeKind,
    TokenizerSpec,
)


@hookimpl
def spiking_lm_datasets(register: Register) -> None:
    """Register the embedded corpora and the loaders of users' own files."""
    for name, config, factory, summary in (
        ("austen3", "EmbeddedConfig", "corpora:austen3", "three novels by Jane Austen, embedded (1.6 MB)"),
        ("text", "SplitConfig", "corpora:text", "your own text: a file, or train/valid/test files"),
        ("wikitext2", "WikiTextConfig", "corpora:wikitext", "WikiText-2: wiki.{train,valid,test}.tokens or .raw"),
        ("wikitext103", "WikiTextConfig", "corpora:wikitext", "WikiText-103: wiki.{train,valid,test}.tokens or .raw"),
        ("ptb", "PathConfig", "corpora:ptb", "Penn Treebank: ptb.{train,valid,test}.txt"),
        ("enwik8", "PathConfig", "corpora:enwik8", "100 MB of Wikipedia, split 90/5/5 million bytes"),
        ("text8", "PathConfig", "corpora:text8", "100 MB of letters and spaces, split 90/5/5 million"),
        ("binidx", "SplitConfig", "corpora:binidx", "tokens in Megatron's format: PREFIX.bin and PREFIX.idx"),
        ("authors4", "EmbeddedConfig", "classification:authors4", "who wrote the sentence, 4 classes, embedded"),
        ("sst2", "TreebankConfig", "classification:sst2", "Stanford Sentiment Treebank, 2 classes"),
        ("sst5", "TreebankConfig", "classification:sst5", "Stanford Sentiment Treebank, 5 classes"),
        ("mr", "FoldConfig", "classification:mr", "movie review sentences, 2 classes, cross-validated"),
        ("subj", "FoldConfig", "classification:subj", "subjective or objective, cross-validated"),
        ("trec", "HeldOutConfig", "classification:trec", "question types, 6 classes"),
        ("tsv", "TableConfig", "classification:tsv", "your own labelled text: label<TAB>text with a header"),
        ("values", "TableConfig", "classification:values", "your own text with numbers: value<TAB>text with a header"),
    ):
        register(
            DatasetSpec(
                name=name,
                config=f"spiking_lm.data.configs:{config}",
                factory=f"spiking_lm.data.{factory}",
                task="classification" if factory.startswith("classification:") else "text",
                summary=summary,
            )
        )
    for name, config, factory, summary in (
        ("gestures11", "Gestures11Config", "gestures11:gestures11", "eleven synthetic gestures as events, from a seed"),
        ("dvs128-gesture", "DVS128Config", "clips:dvs128_gesture", "DVS128 Gesture: IBM's .aedat, tonic's .npy files"),
    ):
        register(
            DatasetSpec(
                name=name,
                config=f"spiking_lm.data.{factory.partition(':')[0]}:{config}",
                factory=f"spiking_lm.data.{factory}",
                task="clips",
                summary=summary,
            )
        )
    for name, config, factory, summary in (
        ("pairs", "PairsConfig", "pairs:pairs", "your own pairs: source and target, .jsonl or .tsv"),
        ("austen-conlang", "EmbeddedConfig", "made_pairs:conlang", "Austen's sentences in a language made by rules"),
        ("austen-telegram", "EmbeddedConfig", "made_pairs:telegram", "Austen's sentences without function words"),
    ):
        register(
            DatasetSpec(
                name=name,
                config=f"spiking_lm.data.configs:{config}",
                factory=f"spiking_lm.data.{factory}",
                task="pairs",
                summary=summary,
            )
        )


@hookimpl
def spiking_lm_tokenizers(register: Register) -> None:
    """Register bytes, characters, words, trained byte-pair encoding and Hugging Face files."""
    for name, config, factory, summary in (
        ("byte", "ByteConfig", "tokenizers:ByteTokenizer", "one token per UTF-8 byte"),
        ("char", "CharConfig", "tokenizers:CharTokenizer", "one token per character of the training text"),
        ("word", "WordConfig", "words:WordTokenizer", "one token per word of the training text"),
        ("bpe", "BPEConfig", "tokenizers:train_bpe", "byte-level BPE, trained on the training text"),
        ("file", "FileConfig", "tokenizers:read_tokenizer_file", "any Hugging Face tokenizer.json"),
        (
            "model",
            "ModelTokenizerConfig",
            "reduced:model_tokenizer",
            "that of a model, e.g. of a distillation's teacher",
        ),
    ):
        register(
            TokenizerSpec(
                name=name,
                config=f"spiking_lm.data.configs:{config}",
                factory=f"spiking_lm.data.{factory}",
                summary=summary,
            )
        )


@hookimpl
def spiking_lm_neurons(register: Register) -> None:
    """Register the neurons that need no framework."""
    kinds: tuple[tuple[str, str, SpikeKind, str], ...] = (
        ("lif", "neurons:LIF", "binary", "leaky integrate-and-fire in plain PyTorch"),
        ("if", "gif_neurons:IF", "binary", "integrate-and-fire without leak, soft reset"),
        ("gif", "gif_neurons:GIF", "integer", "several integrate-and-fire steps in one: counts of spikes"),
        ("gif.ternary", "gif_neurons:TernaryGIF", "ternary", "integrate-and-fire upwards and downwards: -1, 0, 1"),
    )
    for name, neuron, kind, summary in kinds:
        register(
            NeuronSpec(
                name=name,
                summary=summary,
                config=f"spiking_lm.config:{neuron.partition(':')[2]}Config",
                factory=f"spiking_lm.{neuron}",
                spike_kind=kind,
            )
        )


@hookimpl
def spiking_lm_kernels(register: Register) -> None:
    """Register the definition of every op, its fast form in plain PyTorch, and the compiled ones."""
    for op, module, summary, how in (
        ("lif_scan", "torch_fast", "leaky integrate-and-fire over time", "chunked, one or two operations per step"),
        ("wkv", "torch_fast", "the RWKV-4 recurrence over time", "chunked, one or two operations per step"),
        ("egru_scan", "torch_egru", "event-based gated recurrent units over time", "one product per step"),
        ("elastic_scan", "torch_elastic", "elastic bi-spiking neurons over time", "all steps of a piece in the cache"),
        ("attention", "torch_attention", "softmax attention in several steps", "head by head, in the cache"),
        ("gif_linear", "torch_gif", "products of integrate-and-fire counts", "salient channels apart, oneDNN products"),
        ("spike_linear", "linear_ops_torch", "products of few events", "a gather, or a dense product"),
        ("int8_linear", "linear_ops_torch", "products with int8 weights", "weights written out"),
        ("pack_spikes", "linear_ops_torch", "spikes as bits", "by way of bytes"),
        ("packed_linear", "linear_ops_torch", "packed spikes times ternary weights", "counts of bits in a word"),
        ("ternary_linear", "linear_ops_torch", "products with packed ternary weights", "weights written out as int8"),
    ):
        register(
            KernelSpec(
                name=f"{op}/reference",
                summary=f"{summary}: the definition, step by step",
                implementation=f"spiking_lm.kernels.reference:{op}",
            )
        )
        register(
            KernelSpec(
                name=f"{op}/torch",
                summary=f"{summary}: {how}",
                implementation=f"spiking_lm.kernels.{module}:{op}",
                supports=None if module == "linear_ops_torch" else f"spiking_lm.kernels.{module}:supports_{op}",
                priority=10,
            )
        )
    for op, module in (
        *((op, "compiled") for op in ("lif_scan", "wkv", "elastic_scan", "attention")),
        ("egru_scan", "compiled_egru"),
        ("gif_linear", "compiled_gif"),
        *((op, "compiled_linear") for op in ("spike_linear", "int8_linear", "pack_spikes", "packed_linear")),
        ("ternary_linear", "compiled_linear"),
    ):
        register(
            KernelSpec(
                name=f"{op}/numba",
                summary="compiled for this processor, all in one pass",
                implementation=f"spiking_lm.kernels.{module}:{op}",
                supports=f"spiking_lm.kernels.{module}:supports_{op}",
                priority=20,
                extra="cpu",
                requires=("numba",),
            )
        )


@hookimpl
def spiking_lm_metrics(register: Register) -> None:
    """Register what an evaluation reports."""
    for name, summary in (
        ("bits_per_byte", "bits per UTF-8 byte of the text"),
        ("bits_per_character", "bits per Unicode character of the text"),
        ("perplexity", "exp of the mean negative log-likelihood per token"),
        ("masked_perplexity", "the same of hidden tokens, predicted from both sides: another quantity"),
        ("accuracy", "share of right guesses, of tokens or of labels"),
        ("macro_f1", "F1 averaged over the classes"),
        ("mean_squared_error", "of numbers that are predicted"),
        ("correlation", "Pearson's and Spearman's, of numbers that are predicted"),
    ):
        register(MetricSpec(name=name, summary=summary, function=f"spiking_lm.evaluation:{name}"))


@hookimpl
def spiking_lm_recipes(register: Register) -> None:
    """Register the shipped recipes: ``spiking_lm/_recipes`` in a wheel, ``recipes/`` beside ``src`` when editable."""
    package = Path(__file__).parent
    folder = package / "_recipes"
    if not folder.is_dir() and (package.parents[1] / "pyproject.toml").is_file():
        folder = package.parents[1] / "recipes"
    for path in sorted(folder.rglob("*.yaml")):
        register(RecipeSpec(name=path.relative_to(folder).with_suffix("").as_posix(), path=path))


@hookimpl
def spiking_lm_benchmarks(register: Register) -> None:
    """Register the timings of the kernels and of SpikeGPT."""
    for name, function, summary in (
        ("lif/1024x1x2048", "bench:lif_stream", "lif_scan on a long stream, against SNN frameworks"),
        ("lif/128x32x512", "bench:lif_batch", "lif_scan on a batch, against SNN frameworks"),
        ("wkv/1x1024x512", "bench:wkv_stream", "wkv, against a loop under autograd"),
        ("spikegpt/train-fp32", "bench_training:train_fp32", "SpikeGPT in training, over its matrix products"),
        ("spikegpt/train-bf16", "bench_training:train_bf16", "the same under autocast"),
        ("spikegpt/generate", "bench:bench_generation", "generation from a carried state, against recomputing"),
        ("spikegpt/constant-time", "bench:bench_constant_time", "time per token late in a text, over early"),
        ("decode/spikegpt", "bench_decoding:decode_spikegpt", "one stream of SpikeGPT, over what memory allows"),
        ("decode/events", "bench_decoding:decode_events", "products of one token with few events, against dense"),
        ("decode/ternary", "bench_decoding:packed_ternary", "packed ternary products, against dense float32"),
    ):
        register(BenchmarkSpec(name=name, summary=summary, function=f"spiking_lm.{function}"))
    for name, function, summary in (  # they take minutes
        ("distributed/equal", "bench_distributed:bench_equal", "several processes against one, after a killed one too"),
        ("distributed/memory", "bench_distributed:bench_memory", "what training keeps: blocks computed again, chunks"),
        ("bf16/loss", "bench_training:bf16_curve", "500 steps of the quickstart under bf16 autocast, against float32"),
        ("lengths/spikegpt", "bench_lengths:spikegpt", "time per token and memory of SpikeGPT, from 1k to 64k tokens"),
        ("lengths/egru", "bench_lengths:egru", "the same of EGRU"),
        ("lengths/document", "bench_lengths:bench_document", "memory of scoring documents of 64 KiB to 1 MiB"),
        *(
            (f"profile/{model}", f"bench_profile:{model}", f"where the time of {model} goes, in training and inference")
            for model in ("spikegpt", "egru", "spikelm", "bitspike", "spikellm")
        ),
    ):
        register(BenchmarkSpec(name=name, summary=summary, function=f"spiking_lm.{function}", on_request=True))


@hookimpl
def spiking_lm_doctor(register: Register) -> None:
    """Register the checks of what this plugin offers."""
    for name, summary in (
        ("data", "the embedded corpora are complete and unharmed"),
        ("disk", "there is room for a run"),
        ("kernels", "which implementation of each op runs"),
    ):
        register(DoctorSpec(name=name, summary=summary, function=f"spiking_lm.doctor:check_{name}"))
    register(
        DoctorSpec(
            name="decoding",
            summary="what decodes single tokens, and how fast memory is",
            function="spiking_lm.decoding:check_decoding",
        )
    )
