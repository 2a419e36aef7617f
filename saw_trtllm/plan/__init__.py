"""What a build will do: its options, the plan, and the rules of the folder that it writes."""
