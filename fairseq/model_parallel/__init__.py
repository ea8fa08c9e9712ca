"""One model over many devices, one sequence over many devices.

The engine is torch's (DeviceMesh, DTensor, FSDP2); what lies here is what it does not have: which
weights of a model are cut how (policies), state that each head has of its own, and attention with a
bias over a sequence in parts. Modules of this room are imported where they are needed, because
torch's take a second to load.
"""
