"""From what was measured to a report: summaries, findings, counterfactuals, the policy."""
