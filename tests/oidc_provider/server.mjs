// A real OpenID provider for the tests: client_credentials, JWT access tokens for one resource server.
//
// Rotation is a new `Provider` with other keys behind the same address. POST /control {keys, clients, fault, ttl}
// sets any of them: keys are [{kid, alg}] (made here, kept by kid, so that a dropped one can come back), a client's
// id is its tenant, a fault changes what GET /jwks answers, ttl is a token's life in seconds. The answer says how
// often /jwks was asked for.
import { createServer } from 'node:http'
import { generateKeyPairSync } from 'node:crypto'
import { Provider } from 'oidc-provider'

const { AUDIENCE, SECRET, TENANT_CLAIM } = process.env
const SCOPES = 'memories:read memories:write search admin'
const made = new Map()
const state = { keys: [], clients: [], fault: '', ttl: 600, fetches: 0 }
const hanging = new Set()
let answer
let origin

function privateKey({ kid, alg }) {
  if (!made.has(kid)) {
    const pair = {
      RS256: () => generateKeyPairSync('rsa', { modulusLength: 2048 }),
      ES256: () => generateKeyPairSync('ec', { namedCurve: 'P-256' }),
      EdDSA: () => generateKeyPairSync('ed25519'),
    }[alg]()
    made.set(kid, { ...pair.privateKey.export({ format: 'jwk' }), kid, alg, use: 'sig' })
  }
  return structuredClone(made.get(kid))
}

// The resource a client asks for names the key that signs: urn:engram:<kid>.
function resourceServer(ctx, resource) {
  const { kid, alg } = state.keys.find((key) => resource === `urn:engram:${key.kid}`)
  return {
    audience: AUDIENCE,
    scope: SCOPES,
    accessTokenFormat: 'jwt',
    accessTokenTTL: state.ttl,
    jwt: { sign: { alg, kid } },
  }
}

function build() {
  const algorithms = ['RS256', 'ES256', 'EdDSA']
  const provider = new Provider(origin, {
    jwks: { keys: state.keys.map(privateKey) },
    clients: state.clients.map((tenant) => ({
      client_id: tenant,
      client_secret: SECRET,
      grant_types: ['client_credentials'],
      redirect_uris: [],
      response_types: [],
      id_token_signed_response_alg: state.keys[0]?.alg, // must be one the provider has, though none is issued
      scope: SCOPES,
    })),
    scopes: SCOPES.split(' '),
    enabledJWA: { idTokenSigningAlgValues: algorithms },
    extraTokenClaims: (ctx) => ({ [TENANT_CLAIM]: ctx.oidc.client.clientId }),
    features: {
      clientCredentials: { enabled: true },
      devInteractions: { enabled: false },
      resourceIndicators: { enabled: true, getResourceServerInfo: resourceServer },
    },
  })
  provider.on('server_error', (_, error) => console.error(error))
  answer = provider.callback()
}

const faults = {
  500: (res) => res.writeHead(500).end(),
  hang: (res) => hanging.add(res),
  drip: (res) => {
    res.writeHead(200)
    const timer = setInterval(() => res.write(' '), 50)
    res.on('close', () => clearInterval(timer))
  },
  slow: (res, next) => setTimeout(next, 1_000),
  garbage: (res) => res.end('<html>We will be back soon.</html>'),
  oversized: (res) => res.end(JSON.stringify({ keys: [], pad: 'x'.repeat(1 << 20) })),
  empty: (res) => res.end('{"keys":[]}'),
}

async function control(req, res) {
  if (req.method === 'POST') {
    let body = ''
    for await (const piece of req) body += piece
    Object.assign(state, JSON.parse(body))
    build()
    for (const res of hanging) res.destroy()
    hanging.clear()
  }
  res.end(JSON.stringify(state))
}

const server = createServer((req, res) => {
  if (req.url === '/control') return control(req, res)
  if (req.url !== '/jwks') return answer(req, res)
  state.fetches += 1
  const fault = faults[state.fault]
  return fault ? fault(res, () => answer(req, res)) : answer(req, res)
})
server.listen(0, '127.0.0.1', () => {
  origin = `http://127.0.0.1:${server.address().port}`
  build()
  console.log(origin)
})
process.stdin.on('end', () => process.exit(0)).resume() // the tests are gone, however they went
