"""The formats that preferences come in, and what each row of them says."""
