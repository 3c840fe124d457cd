"""What differs between models and between formats: architectures, tokenizers, metadata, and the jobs built of them."""

if __name__ != "llmcompress.converters":
    raise ImportError("this folder installs as llmcompress.converters: import it under that name")
