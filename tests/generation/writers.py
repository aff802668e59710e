"""Teachers that write, and what they write when they are asked one prompt at a time."""

import tokenizers
import torch
import transformers as hf

from tests.tiny import llama, t5, tokenizer

END = "[SEP]"
CHAT = (
    "{% for turn in messages %}{{ turn['role'] }} {{ turn['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
SAMPLED = {"do_sample": True, "num_return_sequences": 2}
SMALL = {"max_new_tokens": 8, "batch_size": 2, "save_steps": 2}


def loud(model):
    """The model with weights so large that it says different things to different prompts."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model


def causal(seed=1, **config):
    torch.manual_seed(seed)
    return loud(llama(eos_token_id=3, **config))


def encoder_decoder(seed=1):
    torch.manual_seed(seed)
    model = loud(t5())
    model.generation_config.eos_token_id = 3
    return model


def words(known=None, **options):
    """A tokenizer that puts an end behind every text, as that of an encoder does."""
    return tokenizer(known, eos_token=END, **options)


def spaced(vocabulary=97):
    """A tokenizer whose words carry the space before them, and lose it at the start of a text; no padding."""
    entries = {"<unk>": 0, "<s>": 1, "</s>": 3, "▁": 2} | {f"▁w{i}": i + 4 for i in range(vocabulary - 4)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(entries, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def letters():
    """A tokenizer of single letters, without spaces."""
    entries = {"<pad>": 0, "</s>": 3, "<s>": 1, "<unk>": 2} | {chr(ord("a") + i): i + 4 for i in range(26)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(entries, merges=[], unk_token="<unk>"))
    backend.decoder = tokenizers.decoders.Fuse()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def some_prompts(count=10):
    """Prompts of different lengths."""
    return [f"w{i} w{(7 * i) % 90}" + " w3" * (i % 5) for i in range(count)]


def answer_ids(model, ids, **options):
    """The tokens behind those of one prompt, up to the end, for each answer to it."""
    inputs = torch.tensor([ids])
    output = model.eval().generate(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), pad_token_id=0, eos_token_id=3, **options
    )
    new = output[:, 1 if model.config.is_encoder_decoder else len(ids) :].tolist()
    return [row[: row.index(3)] if 3 in row else row for row in new]


def files(folder):
    """Every file of a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
