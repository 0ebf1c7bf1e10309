"""What this machine has, what is missing, and the command that mends it.

    run        the story: examine this machine, and under torchrun the ranks together
    findings   one line of what was found
    machine    limits, memory, processors, shared memory, clock
    disk       a folder's space, speed, and what checkpoints and claims ask of its file system
    packages   Python, extras, and whether torch, megatron-core and Transformer Engine import and fit
    gpus       the driver, and every GPU's state
    variables  environment variables that change how training runs
    ranks      the ranks of a job together: versions, clocks, the folder they share
    collectives  the only file that imports torch: how fast ranks compute and speak to one another
    judging    what those measurements say: bandwidth, and who is slow
    printing   findings for people, and as JSON

Packages are asked for by their metadata, and imported in processes of their own: a package that is broken is a finding, too.
"""
