"""What an image earns, one file per reward, and several of them as one number.

Lives here: base (the Protocol; the name of a file is the registry), the rewards, what they share (files named _*),
and unique, the way to every reward: it remembers scores and checks them.
Does not: where a reward runs and how often it is asked (actors/, deployments/), what a score is worth (algorithms/).
"""
