"""An adapter in, what others use out: its card, a plain checkpoint, and what else loads without this package.

`card` writes README.md from the files of a folder, `card_hooks` has PEFT and the Trainers write it; `merge` makes a
plain checkpoint, `export` that and the other forms, and `lora_hooks` lets PEFT convert to LoRA too.
"""
