"""Whether we believe it: pure judgement over evidence, a policy and a time. Returns a frozen `Verified` or raises."""
