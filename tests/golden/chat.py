#!/usr/bin/env python3
"""Writes chat.json: chat templates of ours in well-known styles, conversations, and what `transformers` makes of them.

    python tests/golden/chat.py

Needs transformers and tokenizers; their versions go into the file.
"""
import json
from pathlib import Path

import tokenizers
import transformers

CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou answer questions.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system_message = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Known until: ' ~ (2023 | string) ~ '\\n\\n' ~ system_message ~ '<|eot_id|>' }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant'] %}
        {{- raise_exception('role ' ~ message.role ~ ' is not known') }}
    {%- endif %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

BITNET = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = message['role'] | capitalize + "
    "': ' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% if not loop.last or add_generation_prompt %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)

# What templates use of Jinja and of Python's strings, with tags on lines of their own.
FEATURES = """\
{# Trimmed and stripped as transformers has it. #}
{%- macro turn(role, text='nothing') -%}
    [{{ role | upper }}] {{ text.strip() }}
{%- endmacro -%}
{% set ns = namespace(count=0, last=none) %}
{% for message in messages %}
    {% if message.role == 'tool' %}
        {% continue %}
    {% endif %}
    {% set ns.count = ns.count + 1 %}
  {{ turn(message.role, message['content']) }}
    {% if message.role == 'assistant' %}
        {% generation %}
{{ message.content.split('</think>')[-1].lstrip('\\n') }}
        {%- endgeneration %}
    {% endif %}
    {%- if message.content.startswith('What') and message is mapping and 'content' in message %}
 (a question{{ '!' if loop.index > 1 else '?' }})
    {% endif %}
    {% if ns.count == 5 %}{% break %}{% endif %}
{% endfor %}
{{ messages | length }} {{ messages[-1].role }} {{ messages[::-1][0].content | tojson }}
{{ messages[0] | tojson }} {{ eos_token }}{{ undefined_thing }}{{ pad_token is defined }}
{{ messages | map(attribute='role') | join('|') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ (messages | first).content.replace('a', 'A').title() }} {{ '%s-%d' | format('x', 3) }} {{ [3, 1, 2] | sort | join }}
"""

TOKENS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
CONVERSATIONS = [
    [{"role": "user", "content": "What is 2 + 2?"}],
    [
        {"role": "system", "content": " Be short, and polite. \n"},
        {"role": "user", "content": "Hello, <b>you</b> & \"me\"\n"},
        {"role": "assistant", "content": "\n\nHello é😀 \n"},
        {"role": "user", "content": "What now?"},
        {"role": "assistant", "content": "<think>{{ messages }}</think>\n\nNothing. {% raw %}"},
    ],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "  "},
        {"role": "assistant", "content": "c"},
    ],
]


def main():
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"x": 0}, "x"))
    cases = []
    templates = {"chatml": CHATML, "llama3": LLAMA3, "bitnet": BITNET, "features": FEATURES}
    for name, template in templates.items():
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, chat_template=template, **TOKENS)
        for messages in CONVERSATIONS:
            for prompt in (False, True):
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
                cases.append({"template": name, "messages": messages, "add_generation_prompt": prompt, "text": text})
    versions = {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__}
    golden = {"versions": versions, "tokens": TOKENS, "templates": templates, "cases": cases}
    Path(__file__).with_name("chat.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
