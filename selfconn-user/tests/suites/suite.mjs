// Four mistakes of real test suites. Each case passes unless a connect hits its own port.
// `cargo xtask suites` runs this in a network namespace with a small port range.

import assert from "node:assert";
import net from "node:net";
import test from "node:test";

const ATTEMPTS = 4_000;
const HOST = "127.0.0.1";
const OTHER_CASES = [42_010, 42_020, 42_040];

const attempt = (port) =>
  new Promise((resolve) => {
    const client = net.connect({ host: HOST, port });
    client.once("connect", () => resolve(client));
    client.once("error", () => resolve(undefined));
  });

const firstOfMany = async (port) => {
  for (let number = 0; number < ATTEMPTS; number++) {
    const client = await attempt(port);
    if (client) return client;
  }
};

const greeting = async (port) =>
  new Promise((resolve, reject) => {
    const server = net.createServer((client) => {
      client.on("error", () => {});
      client.once("data", () => client.end("welcome"));
    });
    server.once("error", reject);
    server.listen({ host: HOST, port }, () => resolve(server));
  });

const firstData = (client) => new Promise((resolve) => client.once("data", (data) => resolve(`${data}`)));

test("a client waits for its server", async (context) => {
  let client = await firstOfMany(42_010);
  if (!client) {
    const server = await greeting(42_010);
    context.after(() => server.close());
    client = await attempt(42_010);
  }
  context.after(() => client.destroy());
  client.write("hello");
  assert.strictEqual(await firstData(client), "welcome");
});

test("a server comes back", async (context) => {
  const client = await firstOfMany(42_020);
  context.after(() => client?.destroy());
  const server = await greeting(42_020);
  context.after(() => server.close());
});

test("a port that was given back is dead", async () => {
  let dead;
  do {
    const server = await greeting(0);
    const client = await attempt(server.address().port);
    dead = client.localPort;
    client.resetAndDestroy();
    await new Promise((resolve) => server.close(resolve));
  } while (OTHER_CASES.includes(dead));
  const found = await firstOfMany(dead);
  found?.destroy();
  assert.ok(!found, `nobody listens on ${dead}`);
});

test("a probe finds no listener", async () => {
  const found = await firstOfMany(42_040);
  found?.destroy();
  assert.ok(!found, "nobody listens on 42040");
});
