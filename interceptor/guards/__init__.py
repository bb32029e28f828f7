"""The native processes: who forks them, how they are talked to, what they leave in the journal."""
