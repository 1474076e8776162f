"""Weights of a model in training, sent to those who serve it: what changed, exactly, step by step.

A trainer's ``writer.PatchWriter`` leaves in a folder *anchors*, which are whole checkpoints, and
*versions*, which are patches from the version before. A ``receiver.PatchReceiver`` holds the
weights of a version on its host, applies what comes, and refuses what does not follow exactly.
``versions`` says what lies in the folder. Both sides speak through these files alone.
"""
