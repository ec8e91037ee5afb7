"""What a run costs before it starts: counted from the model's shapes, timed on a device profile, played as events.

    experiment ──► costs (FLOPs, bytes) ──► with a device ──► work (seconds of one worker) ──► simulation (an epoch)
                                                                                              └──► layouts (a search)

Lives here: counts, device profiles, the discrete-event epoch, the search. Does not: Ray, weights, anything measured at
run time.
"""
