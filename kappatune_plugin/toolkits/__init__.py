"""KappaTune inside other people's trainers, a module each. Each imports its toolkit, which is no dependency of ours."""
