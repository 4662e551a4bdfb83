#!/usr/bin/env python3
"""Writes the golden file of tests/tests/chat_loss.rs: the loss of conversations over the assistant's tokens, by PyTorch.

    python tests/golden/chat_loss.py

Needs torch, transformers, tokenizers and numpy; their versions go into the file. The model is a small Llama of
transformers, in f32, whose values come from a formula (`uniform` of gen.py, the place in the order of names is the tensor's
random stream). Each conversation is read on its own, without padding or packing. transformers renders the template and says
which tokens are the assistant's: the template marks its turns with `generation`.

The file holds tokenizer, template, conversations, their token ids and masks, sum and number of the learnt tokens' losses,
and the norm of the gradient of each tensor, for the mean loss and for the sum.
"""
import json
import os
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
import gen  # sets OMP_NUM_THREADS, so first
import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SEED = 3
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + '<|im_end|>' + '\\n' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def said(*texts):
    """A conversation of user and assistant in turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


CONVERSATIONS = [
    said("What is 2 + 2?", "It is 4."),
    [{"role": "system", "content": "Be short."}] + said("Say a word.", "Word.", "And a longer one?", "Wordlessness, é."),
    said("Count to three, please, and then tell me which of them is the largest.", "1"),
    said("Hello", "Hello! Here is a long answer to a short question, which goes on\nfor two lines.", "Thanks", "Bye."),
]


def tokenizer():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True) for token in SPECIAL]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator((message["content"] for messages in CONVERSATIONS for message in messages), trainer)
    return made


def model(vocab_size):
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=vocab_size, max_position_embeddings=256, rope_theta=5000.0, rms_norm_eps=1e-6,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=2, attn_implementation="eager",
    )
    made = transformers.LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for stream, (name, parameter) in enumerate(sorted(made.named_parameters())):
            values = gen.uniform(SEED, stream, parameter.numel())
            # Norms between 3/4 and 5/4, all else between -1/4 and 1/4.
            values = values * np.float32(0.5) + np.float32(parameter.dim() == 1)
            parameter.copy_(torch.from_numpy(values.reshape(parameter.shape)))
    return made


def norms(llama, loss):
    llama.zero_grad()
    loss.backward(retain_graph=True)
    return {name: parameter.grad.double().norm().item() for name, parameter in sorted(llama.named_parameters())}


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tokens = tokenizer()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, chat_template=TEMPLATE)
    llama = model(tokens.get_vocab_size())
    total, count, examples = torch.zeros(()), 0, []
    for messages in CONVERSATIONS:
        read = fast.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = read["input_ids"], read["assistant_masks"]
        examples.append({"ids": ids, "assistant": mask})
        logits = llama(torch.tensor([ids])).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        learnt = torch.tensor(mask[1:], dtype=torch.float32)
        total = total + (losses * learnt).sum()
        count += int(learnt.sum())
    golden = {
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, tokenizers, np)},
        "seed": SEED, "config": llama.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"},
        "tokenizer": json.loads(tokens.to_str()), "template": TEMPLATE, "conversations": CONVERSATIONS, "examples": examples,
        "learnt": count, "sum": total.item(), "mean": total.item() / count,
        "norms": {"mean": norms(llama, total / count), "sum": norms(llama, total)},
    }
    Path(__file__).with_name("chat_loss.json").write_text(json.dumps(golden, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(golden["versions"], "learnt", count, "mean", golden["mean"], [len(example["ids"]) for example in examples])


if __name__ == "__main__":
    main()
