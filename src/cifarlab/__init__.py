"""cifarlab: what does this change to the network do?"""
