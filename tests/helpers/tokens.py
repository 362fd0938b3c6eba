"""Tokenizers of tiny models."""


def template_tokenizer():
    """A tokenizer of Qwen's chat markers and words: its template has as many tokens as with Qwen's own vocabulary."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = (
        "system user assistant Describe the image by detailing color shape size texture quantity text spatial relationships of objects and"
    )
    words = [*["<|im_start|>", "<|im_end|>", "\n", ",", ":", "a", "red", "star", "blue", "ring", "blurred"], *words.split(), "background"]
    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, **{word: i + 2 for i, word in enumerate(words)}}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\|\w+\|>|\w+|[^\w ]"), "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")
