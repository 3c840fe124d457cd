"""What shows that quantized checkpoints and tokenizers are read rightly: for each, the peer it is held against and the
tests that do so. tools/models_table.py makes the README's tables of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Proof:
    """`tests` are names of functions in tests/; `job` is one that runs a whole job, if there is one, and `shows` what of."""

    peer: str
    tests: tuple[str, ...]
    job: str | None = None
    shows: str = "logits"


_JOB = "test_logits_of_a_quantized_model"
SOURCES = {  # by the module of llmcompress/sources
    "gptq": Proof(
        "auto-gptq 0.7.1", ("test_gptq_is_what_auto_gptq_computes_with",),
        "test_every_job_gives_what_it_gives_for_the_dequantized_model", "the dequantized model's file, byte for byte",
    ),
    "bitsandbytes": Proof(
        "bitsandbytes", ("test_four_bits_are_what_bitsandbytes_dequantizes", "test_eight_bits_are_what_bitsandbytes_dequantizes"),
        "test_an_nf4_base_of_qlora_runs_in_llama_cpp",
    ),
    "compressed_tensors": Proof(
        "compressed-tensors", (
            "test_packed_integers_are_what_compressed_tensors_makes", "test_int8_is_what_compressed_tensors_makes",
            "test_fp8_is_what_compressed_tensors_makes", "test_fp4_is_what_compressed_tensors_makes",
        ), _JOB,
    ),
    "fp8": Proof("transformers", ("test_fp8_is_what_transformers_dequantizes",), _JOB),
    "mxfp4": Proof("transformers", ("test_mxfp4_is_what_transformers_dequantizes",), "test_logits_of_gpt_oss"),
    "awq": Proof("a plain reference", ("test_awq_by_hand",), _JOB),
    "nvfp4": Proof("a plain reference", ("test_nvfp4_of_modelopt_by_hand",), _JOB),
    "hqq": Proof("hqq", ("test_hqq_is_what_hqq_dequantizes",), _JOB),
    "bitnet": Proof(
        "transformers", ("test_bitnet_is_what_transformers_computes", "test_bitnet_rounded_online_is_what_transformers_rounds"),
        _JOB,
    ),
    "torchao": Proof(
        "torchao; int4 a plain reference", ("test_torchao_is_what_torchao_dequantizes", "test_torchao_int4_by_hand"),
        "test_logits_of_a_torchao_llama",
    ),
}  # fmt: skip
TOKENIZERS = {  # by a key of FILES in converters/tokenizer_files.py
    "tokenizer.json": Proof("tokenizers, and llama.cpp's own tests", ("test_llama_cpp_cuts_as_the_tokenizer_does", "test_llama_cpps_own_vocabulary_tests")),
    "tokenizer.model": Proof("sentencepiece", ("test_mistrals_sentencepiece_models", "test_a_unigram_model_from_tokenizer_model")),
    "tekken.json": Proof("mistral-common", ("test_tekken_is_cut_as_mistral_common_does",)),
    "*.tiktoken": Proof("tiktoken", ("test_qwens_tiktoken_file_has_the_merges_that_qwen_published", "test_tiktoken_files_are_cut_as_tiktoken_does")),
    "vocab.json": Proof("tokenizers", ("test_gpt2_from_vocab_json_and_merges_txt",)),
    "vocab.txt": Proof("transformers", ("test_wordpiece_is_cut_as_bert_does",)),
    "rwkv_vocab_*.txt": Proof("pyrwkv-tokenizer, and a plain reference", ("test_the_vocabulary_that_rwkv_models_come_with", "test_rwkvs_vocabulary")),
}  # fmt: skip
