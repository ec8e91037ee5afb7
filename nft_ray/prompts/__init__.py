"""Which prompts there are, and which of them an epoch or an evaluation asks for. Pure functions of files and seeds.

Lives here: prompt sets by name and by file, what an epoch draws, GenEval's templates, the small sets of the package.
Does not: how a prompt is encoded (models/), how a set is downloaded (downloads/), what an image earns (rewards/).
"""
