"""cifarlab: what does this change to the network do?"""


class UserError(Exception):
    """An error that the user can mend: one sentence that names the thing and the way out."""
