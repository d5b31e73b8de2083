"""Methods compared on one recipe: `kappatune compare` and `kappatune sweep`.

`methods` reads what to compare, `method_configs` makes PEFT configs of it, `bench` holds what all runs share,
`training` trains one run, `frontier` scales it back, `compare` does all of them; `summary`, `tables` and `plots` show
the results.
"""

DEFAULT_METHODS = (
    "lowest,highest,random,shape_matched_random,lowest_mlp,random_mlp,attention_only,lora,lora_mlp,osf,full"
)
DEFAULT_SCALES = "0.25,0.5,0.75"
