"""The one-shot methods: rtn, gptq, awq, smoothquant."""
