// Colours of values: blue helps, orange opposes, the largest is full.

const SOFTNESS = 0.7; // exponent from share of the largest entry to opacity: small entries stay visible

const STRONG = 0.28; // opacity from which pale text would be hard to read

export const largestOf = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value ?? 0)), 0);

const weightOf = (value, largest) => (largest > 0 ? Math.min(1, Math.abs(value) / largest) ** SOFTNESS : 0);

export const isStrong = (value, largest) => weightOf(value, largest) > STRONG;

export function tint(value, largest) {
  const weight = weightOf(value, largest);
  return weight < 0.02 ? "" : `rgb(var(--${value > 0 ? "helpful" : "opposing"}) / ${weight.toFixed(2)})`;
}
