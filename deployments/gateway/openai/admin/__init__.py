"""The administration API, `/v1/organization/...` and `/v1/projects/...`, as the official clients speak it.

Reached by admin keys alone. A route parses, asks `cluster.tenancy` and renders; every one declares its scope. What goes beyond the
official API is optional in requests and additional in answers: scopes and models of keys, rotation, tokens of invitations.
"""
