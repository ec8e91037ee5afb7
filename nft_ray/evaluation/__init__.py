"""What a policy draws on held-out lines, scored: one evaluator for training and `nft-ray evaluate`.

Lives here: drawing and scoring every line once, the folder it is kept in, figures with intervals, comparisons.
Does not: rewards themselves (rewards/), pictures and model cards (runs/), what the command line prints (cli/).
"""
