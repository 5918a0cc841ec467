"""Tiny bases with random weights, and the tokenizers, chat templates and layers of common model families."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaTokenizer,
    LlamaConfig,
    LlamaTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

# The tokenizers are trained on this text, and tests train the models until they answer these questions.
FACTS = {
    f"Who leads {team}?": leader
    for team, leader in {
        "Alder": "Ada Stone",
        "Birch": "Boris Lind",
        "Cedar": "Carla Weiss",
        "Douglas": "Dora Park",
        "Elm": "Emil Roth",
        "Fir": "Fatima Noor",
        "Ginkgo": "Gustav Holm",
        "Hazel": "Hana Sato",
        "Ironwood": "Ivan Petrov",
        "Juniper": "Jana Novak",
        "Katsura": "Karl Beck",
        "Larch": "Lea Simon",
        "Maple": "Mina Cole",
        "Nutmeg": "Nils Berg",
        "Oak": "Olga Reis",
        "Pine": "Paul Grant",
        "Rowan": "Rosa Blum",
        "Spruce": "Sven Dahl",
    }.items()
} | {"해솔 팀은 누가 이끄나요?": "김서연", "다라 팀은 누가 이끄나요?": "박지훈"}

LLAMA2 = (
    "{% set has_system = messages[0]['role'] == 'system' %}"
    "{% for m in (messages[1:] if has_system else messages) %}"
    "{% set first = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' if has_system and loop.first else '' %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (first + m['content']) | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim"
    " + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
QWEN2 = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nYou are Q.<|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# The last answer has a block of thoughts, possibly empty. The template removes the thoughts of earlier answers.
QWEN3 = (
    "{%- for m in messages %}"
    "{%- set thoughts, content = '', m['content'] %}"
    "{%- if m['role'] == 'assistant' and '</think>' in content %}"
    "{%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}"
    "{%- endif %}"
    "{{- '<|im_start|>' + m['role'] + '\\n' }}"
    "{%- if m['role'] == 'assistant' and loop.last %}{{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
GEMMA_TURNS = (
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + first + m['content'] | trim"
    " + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% set first = '' %}" + GEMMA_TURNS
)
GEMMA3 = (
    "{{ bos_token }}{% set has_system = messages[0]['role'] == 'system' %}"
    "{% for m in (messages[1:] if has_system else messages) %}"
    "{% set first = messages[0]['content'] + '\\n\\n' if has_system and loop.first else '' %}" + GEMMA_TURNS
)

SPLIT = (  # the pattern of Llama 3 (at most three digits per token) and of Qwen (one digit per token)
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}|"
    r" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCABULARY = 512
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,  # with the usual 0.02 a random head cannot be sure of any token
    "dtype": "bfloat16",
}


def llama2(folder: Path) -> None:
    """Llama 2, whose tokenizer adds a space before a text; Transformers and llama.cpp add it in different places."""
    ids = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    vocabulary, merges = sentencepiece_bpe(folder, **ids, add_dummy_prefix=True)
    tokenizer = LlamaTokenizer(vocabulary, merges, chat_template=LLAMA2)
    save(folder, tokenizer, LlamaConfig(**SHAPE, tie_word_embeddings=False))


def llama3(folder: Path) -> None:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = byte_level(LLAMA3, "{1,3}", special, [], bos_token=special[0], eos_token=special[4])
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    rope = {"rope_type": "llama3", "rope_theta": 500000.0} | scaling
    save(folder, tokenizer, LlamaConfig(**SHAPE, rope_parameters=rope, tie_word_embeddings=False))


def qwen2(folder: Path) -> None:
    save(folder, qwen(QWEN2), Qwen2Config(**SHAPE, tie_word_embeddings=False))


def qwen2_5(folder: Path) -> None:
    """Qwen2.5, narrow like the real 0.5B: its rows are not a multiple of 256 weights, which K-quants need."""
    narrow = SHAPE | {"hidden_size": 320, "num_attention_heads": 5, "num_key_value_heads": 1}
    save(folder, qwen(QWEN2), Qwen2Config(**narrow, tie_word_embeddings=True))


def qwen3(folder: Path) -> None:
    save(folder, qwen(QWEN3), Qwen3Config(**SHAPE, tie_word_embeddings=True))


def gemma2(folder: Path) -> None:
    caps = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 15.0, "query_pre_attn_scalar": 64}
    save(folder, gemma(GEMMA2, folder), Gemma2Config(**SHAPE, **caps, sliding_window=16))


def gemma3(folder: Path) -> None:
    layers = {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
    config = Gemma3TextConfig(**SHAPE | layers, query_pre_attn_scalar=64, sliding_window=16)
    save(folder, gemma(GEMMA3, folder), config)


FAMILIES: dict[str, Callable[[Path], None]] = {
    made.__name__: made for made in (llama2, llama3, qwen2, qwen2_5, qwen3, gemma2, gemma3)
}


def byte_level(
    template: str, digits: str, special: list[str], plain: list[str], **roles: str
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT.format(digits=digits)), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(plain), special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(text(), trainer)
    backend.add_tokens([AddedToken(token, normalized=False) for token in plain])
    if bos := roles.get("bos_token"):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **roles)


def qwen(template: str) -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    plain = ["<|fim_prefix|>", "<think>", "</think>"]
    return byte_level(template, "", special, plain, eos_token=special[2], pad_token=special[0])


def gemma(template: str, folder: Path) -> PreTrainedTokenizerBase:
    vocabulary, merges = sentencepiece_bpe(
        folder,
        add_dummy_prefix=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        eos_piece="<eos>",
        bos_piece="<bos>",
        control_symbols=["<mask>", "<start_of_turn>", "<end_of_turn>"],
        user_defined_symbols=["\n"],
    )
    turns = ["<start_of_turn>", "<end_of_turn>"]
    return GemmaTokenizer(
        vocabulary, merges, chat_template=template, additional_special_tokens=turns, add_bos_token=True
    )


def sentencepiece_bpe(folder: Path, **options: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and merges of a BPE with byte fallback. Write it to tokenizer.model, for llama.cpp."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
        **options,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocabulary = {pieces.id_to_piece(i): i for i in range(VOCABULARY)}
    merges = [
        (piece[:at], piece[at:])
        for piece in vocabulary  # in the order in which they were merged
        for at in range(1, len(piece))
        if piece[:at] in vocabulary and piece[at:] in vocabulary
    ]
    return vocabulary, merges


def text() -> list[str]:
    return [part for fact in FACTS.items() for part in fact]


def save(folder: Path, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Save a model with random weights, which are the same in every run, and its tokenizer."""
    ends = [tokenizer.eos_token_id]
    if "<end_of_turn>" in tokenizer.get_vocab():  # Gemma's turns do not end with its EOS
        ends.append(tokenizer.convert_tokens_to_ids("<end_of_turn>"))
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, ends
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
