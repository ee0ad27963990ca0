// Tools that the chat offers for show. They run here, read three made-up files, and can do no harm.

const FILES = {
  "notes.txt": "Meeting at 10:30. Ask Mira about the cache.\n",
  "todo.txt": "1. water the plants\n2. fix the login test\n3. buy 12 apples\n",
  "src/app.py": "def total(prices):\n    return sum(prices)\n",
};
const NUMBER_MAX = 1e15;

const tool = (name, description, parameter) => ({
  type: "function",
  function: { name, description, parameters: { type: "object", properties: { [parameter]: { type: "string" } }, required: [parameter] } },
});

export const TOOLS = [
  tool("calculator", "Evaluate an arithmetic expression.", "expression"),
  tool("list_files", "List the files in a folder.", "path"),
  tool("read_file", "Read a text file.", "path"),
];

/** The result of one call, as text; what is wrong with it is text, too: it is the model that reads it. */
export function run(name, argumentText) {
  let given;
  try {
    given = JSON.parse(argumentText);
  } catch {
    return "error: wrong arguments";
  }
  if (name === "calculator" && typeof given?.expression === "string") return calculate(given.expression);
  if (typeof given?.path !== "string") return "error: wrong arguments";
  const path = given.path.replace(/^(\.\/|\/)+/, "").replace(/\/+$/, "").replace(/^\.$/, "");
  if (name === "read_file") return Object.hasOwn(FILES, path) ? FILES[path] : "error: no such file";
  if (name === "list_files") return list(path);
  return `error: no tool ${name}`;
}

function list(path) {
  const inside = Object.keys(FILES).filter((file) => path === "" || file.startsWith(`${path}/`)).map((file) => file.slice(path ? path.length + 1 : 0));
  const names = [...new Set(inside.map((file) => (file.includes("/") ? `${file.split("/")[0]}/` : file)))].sort();
  return names.join("\n") || "error: no such folder";
}

/** + - * / and parentheses, by recursive descent: nothing is evaluated as code. */
export function calculate(expression) {
  const tokens = expression.slice(0, 1000).match(/\d+\.?\d*|\.\d+|[-+*/()]|\S/g) ?? [];
  let [at, depth] = [0, 0];
  const fail = () => { throw new Error("not arithmetic"); };
  const atom = () => {
    const token = tokens[at++];
    if (++depth > 200) fail();
    let value;
    if (token === "(") {
      value = sum();
      if (tokens[at++] !== ")") fail();
    } else if (token === "-") value = -atom();
    else if (token === "+") value = atom();
    else if (token !== undefined && /^[\d.]/.test(token)) value = Number(token);
    else fail();
    depth--;
    return value;
  };
  const product = () => {
    let value = atom();
    while (tokens[at] === "*" || tokens[at] === "/") value = tokens[at++] === "*" ? value * atom() : value / atom();
    return value;
  };
  const sum = () => {
    let value = product();
    while (tokens[at] === "+" || tokens[at] === "-") value = tokens[at++] === "+" ? value + product() : value - product();
    return value;
  };
  try {
    const value = sum();
    if (at !== tokens.length || Number.isNaN(value)) fail();
    if (!Number.isFinite(value)) return "error: division by zero";
    if (Math.abs(value) > NUMBER_MAX) fail();
    return String(Math.round(value * 1e6) / 1e6);
  } catch {
    return "error: not an arithmetic expression";
  }
}
